# GPT-2's feed-forward network and norm with LLaMA's rotary positions and pre-norm: what RoPE and
# the norm's place bring by themselves. Tied head: 123,586,560 parameters.
arch_preset = 'hybrid'

out_dir = 'out-hybrid'
dataset = 'shakespeare'
