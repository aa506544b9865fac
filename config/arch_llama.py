# LLaMA's architecture (Touvron et al. 2023): rotary positions, RMSNorm before each part, SwiGLU,
# no biases, an output head of its own. 12 layers × 768 wide: 162,220,800 parameters, of which
# 123,568,128 multiply.
arch_preset = 'llama'

out_dir = 'out-llama'
dataset = 'shakespeare'
