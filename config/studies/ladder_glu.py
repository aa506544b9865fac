# Shazeer (2020) found gated feed-forward networks better than ungated ones of equal size. At 0.8 M
# parameters (gated_ffn.py), the original GLU with its sigmoid gate was worse. Does this change with
# size?
question = 'Does GLU overtake the ungated feed-forward network as models grow?'

ladder = {
    'n_layer': [2, 2, 3, 3],
    'n_embd': [32, 48, 48, 64],
    'n_head': [2, 3, 3, 4],
}
baseline_extra = {'n_layer': 4, 'n_embd': 64, 'n_head': 4}
horizon = {'tokens_per_param': 10}
sweep = {'ffn_type': ['standard', 'glu'], 'seed': [1, 2, 3]}
baseline = {'ffn_type': 'standard'}
reference = {'ffn_type': 'standard'}
match = 'params'  # sets d_ff of GLU to match
match_step = 1

arch_preset = 'llama'
weight_tying = True

# Small enough for two CPU cores: 25 to 200 thousand parameters, bytes of Python code.
dataset = 'python_stdlib'
block_size = 64
batch_size, gradient_accumulation_steps = 16, 1
eval_interval, eval_iters = 100, 100
log_interval = 20
learning_rate = 3e-3
dtype = 'float32'
always_save_checkpoint = False
out_dir = 'out-ladder-glu'
