# LLaMA (Touvron et al. 2023): rotary positions, RMSNorm before each sublayer, SwiGLU, no biases, no
# weight tying. 12 layers × 768 wide: 162,220,800 parameters, of which 123,568,128 are in matrix
# multiplications.
arch_preset = 'llama'

out_dir = 'out-llama'
dataset = 'shakespeare'
