# Pythia 160M (Biderman et al. 2023; GPT-NeoX: Black et al. 2022) as it is: attention and FFN side
# by side, a quarter of each head turned, LayerNorm, GELU, biases. 12 layers × 768 wide: 162,322,944
# parameters.
arch_preset = 'pythia'

out_dir = 'out-pythia'
dataset = 'shakespeare'
