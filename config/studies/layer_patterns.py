# Layers of different kinds: local ones with a few global ones between them (Gemma 2 and 3), global
# ones without a position encoding (Llama 4, SmolLM3), and feed-forward networks of unequal width.
question = 'Which mix of layers learns most from equal FLOPs per token?'

sweep = {
    'layer_pattern': ['G', 'L', 'LLLG', 'LLLN', 'SSGG'],
    'seed': [1, 2, 3],
}
# G: the model's own options. A kind that a variant's pattern does not use is left out.
layer_kinds = {
    'L': {'sliding_window': 32},  # local: each token sees itself and the 31 before it
    'N': {'position_encoding': 'none'},  # global, without positions
    'S': {'d_ff': 88},  # about half of the width; match widens the other layers
}
baseline = {'layer_pattern': 'G'}
match = 'flops'  # per token: sets d_ff of the layers that do not set their own
match_step = 1
reference = {'layer_pattern': 'G'}

arch_preset = 'llama'
weight_tying = True

# Small enough for one CPU core: 4 layers, n_embd 64, 128 characters of context, 768 per iteration.
dataset = 'shakespeare_char'
n_layer, n_head, n_embd, block_size = 4, 4, 64, 128
batch_size, gradient_accumulation_steps = 6, 1
max_iters = 1200
eval_interval, eval_iters = 200, 200
log_interval = 20
learning_rate = 4e-3
dtype = 'float32'
diagnostics = True  # for the loss by position
always_save_checkpoint = False
out_dir = 'out-study-layer-patterns'
