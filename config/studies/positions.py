# Su et al. (2021), Press et al. (2022), Haviv et al. (2022): how much does the position encoding
# matter, and is one needed at all with a causal mask?
question = 'Which position encoding is best: rotary, ALiBi, learned, or none?'

sweep = {
    'position_encoding': ['learned_absolute', 'rope', 'alibi', 'none'],
    'seed': [1, 2, 3, 4, 5],
}
baseline = {'position_encoding': 'rope'}

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
diagnostics = True  # for the loss by position
always_save_checkpoint = False
out_dir = 'out-study-positions'
