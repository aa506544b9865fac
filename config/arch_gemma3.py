# Gemma 3 (Gemma Team 2025) with the 4B model's ratios: Gemma 2's blocks with QK norm in place of
# soft caps; 5 local layers, with a window of 1/32 of the context and RoPE of base 10,000, for each
# global one of base 1,000,000. 12 layers × 768 wide: 144,840,960 parameters.
arch_preset = 'gemma3'

out_dir = 'out-gemma3'
dataset = 'shakespeare'
