# Llama 4 (Meta 2025) with Scout's ratios: chunks of 1/32 of the context with RoPE and QK norm
# without weights in three of four layers (R), no positions in the fourth (N); 5 query heads share
# keys and values (4 if there are 12); 1 of 16 experts, weighted at its input, and a shared one.
# 12 layers × 768 wide: 674,188,032 parameters, of which a token uses 163,252,992
# (llama: 162,220,800).
arch_preset = 'llama4'

out_dir = 'out-llama4'
dataset = 'shakespeare'
