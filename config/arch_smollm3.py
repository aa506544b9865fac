# SmolLM3 (Bakouch et al. 2025) with the 3B model's ratios: rotary positions in three of four layers
# (R) and none in the fourth (N), 4 query heads share keys and values, SwiGLU 5.375 × as wide, tied
# head. 12 layers × 768 wide: 170,478,336 parameters.
arch_preset = 'smollm3'

out_dir = 'out-smollm3'
dataset = 'shakespeare'
