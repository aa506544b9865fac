# Mamba (Gu & Dao 2023): layers of one sublayer, a selective state space with 16 states in each of
# 2 · 768 channels. The published model of this width has 24 layers. 12 layers × 768 wide:
# 83,894,016 parameters.
arch_preset = 'mamba'

out_dir = 'out-mamba'
dataset = 'shakespeare'
