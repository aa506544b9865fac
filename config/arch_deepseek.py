# DeepSeek-V2-Lite (DeepSeek-AI 2024) in its ratios: latent attention; after a first dense layer 6
# of 32 small experts (there 64) and 2 shared ones a token, together as wide as llama's FFN.
# 12 layers × 768 wide: 326,169,600 parameters, of which a token uses 157,479,936 (llama:
# 162,220,800).
arch_preset = 'deepseek'

out_dir = 'out-deepseek'
dataset = 'shakespeare'
