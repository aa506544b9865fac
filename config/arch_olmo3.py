# OLMo 3 (OLMo et al. 2025), the 7B model's components: those of OLMo 2, with a window of half the
# context in three of four layers (L) and none in the fourth (G). 12 layers × 768 wide: 162,239,232
# parameters.
arch_preset = 'olmo3'

out_dir = 'out-olmo3'
dataset = 'shakespeare'
