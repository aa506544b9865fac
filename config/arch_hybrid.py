# GPT-2's feed-forward network and norm with LLaMA's rotary positions and pre-norm, to see what
# these two change by themselves. Tied head. 12 layers × 768 wide: 123,587,328 parameters.
arch_preset = 'hybrid'

out_dir = 'out-hybrid'
dataset = 'shakespeare'
