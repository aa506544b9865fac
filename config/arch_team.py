# The team's model_v1: the same choices as LLaMA's (rotary positions, RMSNorm before each part,
# SwiGLU, no biases, an output head of its own), kept under its own name and out_dir.
arch_preset = 'team'

out_dir = 'out-team'
dataset = 'shakespeare'
