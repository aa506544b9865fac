# DeepSeek-V2-Lite's ratios (DeepSeek-AI 2024): latent attention; after a dense first layer, 6 of 32
# small experts (64 in the original) and 2 shared ones per token, together as wide as llama's FFN.
# 12 layers × 768 wide: 326,169,600 parameters, of which a token uses 157,479,936 (llama:
# 162,220,800).
arch_preset = 'deepseek'

out_dir = 'out-deepseek'
dataset = 'shakespeare'
