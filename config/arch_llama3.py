# Llama 3 (Grattafiori et al. 2024) with the 8B model's ratios: 4 query heads share keys and values,
# the FFN is 3.5 × as wide, rotary base 500,000. 12 layers × 768 wide: 169,298,688 parameters. To
# extend the context after pretraining: --rope_scaling=llama3.
arch_preset = 'llama3'

out_dir = 'out-llama3'
dataset = 'shakespeare'
