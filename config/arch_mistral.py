# Mistral (Jiang et al. 2023) with the 7B model's ratios: 4 query heads share keys and values, the
# FFN is 3.5 × as wide, every layer has a window of half the context. 12 layers × 768 wide:
# 169,298,688 parameters.
arch_preset = 'mistral'

out_dir = 'out-mistral'
dataset = 'shakespeare'
