# Jamba (Lieber et al. 2024) with the v0.1 model's ratios: Mamba in seven of eight layers (M, and E
# with 2 of 16 experts), attention without positions in the eighth (A). 12 layers × 768 wide:
# 752,016,496 parameters, of which a token uses 231,791,728.
arch_preset = 'jamba'

out_dir = 'out-jamba'
dataset = 'shakespeare'
