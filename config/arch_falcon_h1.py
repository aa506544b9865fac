# Falcon-H1 (Zuo et al. 2025) with the 1.5B model's ratios: attention and Mamba-2 in parallel in
# each layer, 0.5 and 1.5 times as wide as the model, FFN 2.25 times; without its multipliers, which
# were tuned together with learning rates of each matrix. 12 layers × 768 wide: 168,383,880
# parameters.
arch_preset = 'falcon_h1'

out_dir = 'out-falcon_h1'
dataset = 'shakespeare'
