# Zhang & Sennrich (2019) found that RMSNorm is as good as LayerNorm at a lower cost.
question = 'Is RMSNorm as good as LayerNorm, and is a norm needed at all?'

sweep = {'normalization': ['layernorm', 'rmsnorm', 'none'], 'seed': [1, 2, 3, 4, 5]}
baseline = {'normalization': 'layernorm'}
on_nonfinite = 'skip'  # without a norm, training may diverge

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
out_dir = 'out-study-norms'
