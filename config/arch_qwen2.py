# Qwen2 (Yang et al. 2024) with the 7B model's ratios: biases of queries, keys and values alone, 7
# query heads share keys and values (6 of 12 heads), FFN 5.29 · n_embd wide.
# 12 layers × 768 wide: 205,953,792 parameters.
arch_preset = 'qwen2'

out_dir = 'out-qwen2'
dataset = 'shakespeare'
