# A mix in the manner of modded-nanogpt (Jordan et al. 2024): squared ReLU, normalised queries and
# keys, RMSNorm, rotary positions, capped logits. 12 layers × 768 wide: 162,222,336 parameters.
arch_preset = 'speedrun'

out_dir = 'out-speedrun'
dataset = 'shakespeare'
