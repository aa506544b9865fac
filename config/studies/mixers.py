# What mixes information across tokens: softmax attention, recurrences with a state of fixed size,
# and hybrids of them (Gated DeltaNet and Mamba-2, three to one as in Qwen3-Next; gated short
# convolutions with a few layers of attention as in LFM2). K tells how much is due to the short
# convolutions, which the recurrences have too: attention with such a convolution of q, k and v.
question = 'Which mixer learns most from equal parameters?'

sweep = {
    'layer_pattern': ['A', 'K', 'D', 'M', 'DDDA', 'CCAC'],
    'seed': [1, 2, 3],
}
layer_kinds = {
    'D': {'mixer': 'gated_deltanet'},
    'M': {'mixer': 'mamba2'},
    'C': {'mixer': 'short_conv'},
    'K': {'canon': 'B'},
}
baseline = {'layer_pattern': 'A'}
match = 'params'  # sets d_ff of each variant; `--match=flops` for equal FLOPs instead
match_step = 1
reference = {'layer_pattern': 'A'}

arch_preset = 'llama'
weight_tying = True

# Small enough for one CPU core: 4 layers, n_embd 64, 256 bytes of context, 1,536 per iteration.
dataset = 'python_stdlib'
n_layer, n_head, n_embd, block_size = 4, 4, 64, 256
batch_size, gradient_accumulation_steps = 6, 1
max_iters = 500
eval_interval, eval_iters = 100, 100
log_interval = 20
learning_rate = 3e-3
dtype = 'float32'
diagnostics = True  # for the loss by position
always_save_checkpoint = False
out_dir = 'out-study-mixers'
