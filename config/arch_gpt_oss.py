# gpt-oss-20b's ratios (OpenAI 2025): attention sinks, a window of 1/32 of the context in every
# other layer, 8 query heads that share keys and values, biases; 4 of 32 experts with clamped
# SwiGLU.
# 12 layers × 768 wide: 780,677,904 parameters, of which a token uses 185,361,168
# (llama: 162,220,800).
arch_preset = 'gpt_oss'

out_dir = 'out-gpt_oss'
dataset = 'shakespeare'
