# Your own mix: choose one component of each kind. The comments list the choices;
# `python train.py --list_components` describes them. A component of your own can be defined in a
# file like this one and chosen by its name.
arch_preset = 'custom'

# attention, none, deltanet, gated_deltanet, kda, short_conv, linear_attention, retnet,
# lightning_attention, gla, mamba, mamba2, rg_lru
mixer = 'attention'
# standard, mla
attention_type = 'standard'
# sdpa, manual, flex
attention_backend = None  # depends on the device and the architecture
# none, learned_absolute, sinusoidal, rope, alibi, t5_relative
position_encoding = 'rope'
rope_theta = 10000.0  # for rope
# layernorm, layernorm_nobias, layernorm_nogain, rmsnorm, rmsnorm_nogain, dyt, none
normalization = 'rmsnorm'
# standard, swiglu, clamped_swiglu, geglu, reglu, glu, bilinear, none, moe
ffn_type = 'standard'
# gelu, gelu_tanh, silu, relu, relu2, leaky_relu, xielu
activation = 'gelu'  # for ffn_type = 'standard'
# pre, post, entrance, sandwich, ffn_sandwich, reordered, parallel
norm_position = 'pre'
# addition, multiplier, deepnorm, layer_scale, rezero, x0_lambdas
residual = 'addition'
# normal, gpt2, mup
initialization = 'gpt2'
bias = False
weight_tying = True
dropout = 0.0

n_layer = 12
n_head = 12
n_embd = 768

# adamw, muon, lion
optimizer = 'adamw'
# constant, cosine, linear, wsd
lr_schedule = 'cosine'

out_dir = 'out-custom'
dataset = 'shakespeare'
