# Your own mix: choose one of each. `python train.py --help` lists what there is, and README shows
# how to define a component of your own right in a file like this one.
arch_preset = 'custom'

normalization = 'rmsnorm'  # layernorm, layernorm_nobias, rmsnorm
position_encoding = 'rope'  # learned_absolute, rope, none
rope_theta = 10000.0
attention_backend = 'sdpa'  # sdpa (fast), manual (written out)
ffn_type = 'standard'  # standard (4 × n_embd wide), swiglu (8/3 × n_embd)
activation = 'gelu'  # of the standard FFN: gelu, silu, relu, leaky_relu
norm_position = 'pre'  # pre, post
bias = False
weight_tying = True
dropout = 0.0

n_layer = 12
n_head = 12
n_embd = 768

out_dir = 'out-custom'
dataset = 'shakespeare'
