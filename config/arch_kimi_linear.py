# Kimi-Linear-48B-A3B's ratios (Kimi Team 2025): Kimi Delta Attention (K) in three of four layers,
# latent attention without positions (A) in the fourth; after a dense first layer (D), 8 of 32
# experts (256 in the original) and a shared one per token, together 4 × as wide.
# 12 layers × 768 wide: 423,610,260 parameters, of which a token uses 214,370,196 (llama:
# 162,220,800).
arch_preset = 'kimi_linear'

out_dir = 'out-kimi_linear'
dataset = 'shakespeare'
