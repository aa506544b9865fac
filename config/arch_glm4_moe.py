# GLM-4.5-Air's ratios (Zhipu AI 2025): RoPE on half of each head, heads together 3 × as wide as the
# model, 12 query heads that share keys and values; after a dense first layer, 8 of 32 experts (128
# in the original) and a shared one per token, balanced by a bias.
# 12 layers × 768 wide: 349,110,528 parameters, of which a token uses 188,530,944
# (llama: 162,220,800).
arch_preset = 'glm4_moe'

out_dir = 'out-glm4_moe'
dataset = 'shakespeare'
