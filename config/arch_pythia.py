# Pythia 160M (Biderman et al. 2023; GPT-NeoX: Black et al. 2022): attention and FFN in parallel,
# rotary positions in a quarter of each head, LayerNorm, GELU, biases. 12 layers × 768 wide:
# 162,322,944 parameters.
arch_preset = 'pythia'

out_dir = 'out-pythia'
dataset = 'shakespeare'
