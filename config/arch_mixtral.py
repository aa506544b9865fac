# Mixtral (Jiang et al. 2024): mistral without the window, with 2 of 8 experts per token, each half
# as wide as mistral's FFN, so that as many parameters are active. 12 layers × 768 wide: 392,325,888
# parameters, of which a token uses 169,372,416 (mistral: 169,298,688).
arch_preset = 'mixtral'

out_dir = 'out-mixtral'
dataset = 'shakespeare'
