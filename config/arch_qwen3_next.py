# Qwen3-Next-80B-A3B's ratios (Qwen Team 2025): Gated DeltaNet (G) in three of four layers; gated
# attention (A) with RoPE on a quarter of each head, 6 query heads that share keys and values (8 in
# the original); 10 of 64 small experts (512 in the original) and a gated shared one per token,
# together as wide as llama's FFN.
# 12 layers × 768 wide: 477,640,176 parameters, of which a token uses 190,985,712 (llama:
# 162,220,800).
arch_preset = 'qwen3_next'

out_dir = 'out-qwen3_next'
dataset = 'shakespeare'
