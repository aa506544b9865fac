# DeepSeek-V3's ratios (DeepSeek-AI 2024): latent attention; after a dense first layer, 8 of 32
# experts (256 in the original), from 4 of 8 groups, and a shared one per token, balanced by a bias.
# 12 layers × 768 wide: 288,964,992 parameters, of which a token uses 157,581,696
# (llama: 162,220,800).
arch_preset = 'deepseek_v3'

out_dir = 'out-deepseek_v3'
dataset = 'shakespeare'
