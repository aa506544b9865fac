# Command R7B's ratios (Cohere 2024): attention and FFN in parallel after one LayerNorm without
# bias; a window of half the context with RoPE in three of four layers (L), no positions in the
# fourth (G); 4 query heads share keys and values, SwiGLU 3.5 × as wide, a multiplier of the logits,
# tied head. 12 layers × 768 wide: 130,656,000 parameters.
arch_preset = 'cohere2'

out_dir = 'out-cohere2'
dataset = 'shakespeare'
