# Qwen3 (Yang et al. 2025) with the 0.6B model's ratios: heads of 128 dimensions (in total twice
# n_embd), 2 query heads share keys and values, queries and keys of each head normalized, tied head.
# 12 layers × 768 wide: 144,824,064 parameters.
arch_preset = 'qwen3'

out_dir = 'out-qwen3'
dataset = 'shakespeare'
