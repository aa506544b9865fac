# OLMo 2 (OLMo et al. 2024), 7B: norms after the parts, queries and keys normalised over all heads
# at once, z-loss, rotary base 500,000. 12 layers × 768 wide: 162,239,232 parameters.
arch_preset = 'olmo2'

out_dir = 'out-olmo2'
dataset = 'shakespeare'
