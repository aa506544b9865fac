# Preset `team`: the same architecture as `llama` (rotary positions, RMSNorm before each sublayer,
# SwiGLU, no biases, no weight tying) under a second name, with an out_dir of its own.
arch_preset = 'team'

out_dir = 'out-team'
dataset = 'shakespeare'
