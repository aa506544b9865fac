# GPT-2's feed-forward network and norm with LLaMA's rotary positions and pre-norm: what RoPE and
# the norm's place bring by themselves. Tied head. 12 layers × 768 wide: 123,587,328 parameters.
arch_preset = 'hybrid'

out_dir = 'out-hybrid'
dataset = 'shakespeare'
