# Shazeer (2020) found gated feed-forward networks better than ungated ones of equal size.
question = 'Is a gated feed-forward network better than an ungated one with as many parameters?'

sweep = {
    'ffn_type': ['standard', 'glu', 'bilinear', 'reglu', 'geglu', 'swiglu'],
    'seed': [1, 2, 3, 4, 5],
}
baseline = {'ffn_type': 'standard'}
match = 'params'  # sets d_ff of each gated network to match the standard one
match_step = 1
reference = {'ffn_type': 'standard'}

arch_preset = 'llama'
weight_tying = True

# Small enough for two CPU cores: 4 layers, n_embd 128, 64 characters of context, 768 per iteration.
dataset = 'shakespeare_char'
n_layer, n_head, n_embd, block_size = 4, 4, 128, 64
batch_size, gradient_accumulation_steps = 12, 1
max_iters = 600
eval_interval, eval_iters = 100, 300
log_interval = 20
learning_rate = 2e-3
dtype = 'float32'
always_save_checkpoint = False
out_dir = 'out-study-gated-ffn'
