# Qwen3-30B-A3B's ratios (Qwen Team 2025): QK norm per head, heads together 2 × as wide as the
# model, 8 query heads that share keys and values, 8 of 32 small experts per token (128 in the
# original).
# 12 layers × 768 wide: 365,418,240 parameters, of which a token uses 174,315,264
# (llama: 162,220,800).
arch_preset = 'qwen3_moe'

out_dir = 'out-qwen3_moe'
dataset = 'shakespeare'
