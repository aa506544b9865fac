# In the style of modded-nanogpt (Jordan et al. 2024): squared ReLU, normalized queries and keys,
# RMSNorm, rotary positions, capped logits; Muon and a learning rate that is constant, then decays.
# 12 layers × 768 wide: 162,222,336 parameters.
arch_preset = 'speedrun'

optimizer = 'muon'
lr_schedule = 'wsd'
decay_fraction, decay_shape = 0.4, 'linear'

out_dir = 'out-speedrun'
dataset = 'shakespeare'
