# OLMo 2 (OLMo et al. 2024), the 7B model's components: norms after the sublayers, queries and keys
# normalized over all heads at once, z-loss, rotary base 500,000. 12 layers × 768 wide: 162,239,232
# parameters.
arch_preset = 'olmo2'

out_dir = 'out-olmo2'
dataset = 'shakespeare'
