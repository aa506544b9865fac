# Qwen3 (Yang et al. 2025) in the 0.6B model's ratios: heads of 128 columns, so twice the width in
# all, 2 of which share keys and values; each head's queries and keys normalised; tied head.
# 12 layers × 768 wide: 144,824,064 parameters.
arch_preset = 'qwen3'

out_dir = 'out-qwen3'
dataset = 'shakespeare'
