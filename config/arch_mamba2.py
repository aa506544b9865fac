# Mamba-2 (Dao & Gu 2024): layers of one sublayer, a state space of 24 heads of 64 dimensions with a
# state of 128 each. The published model of this width has 24 layers. 12 layers × 768 wide:
# 83,818,080 parameters.
arch_preset = 'mamba2'

out_dir = 'out-mamba2'
dataset = 'shakespeare'
