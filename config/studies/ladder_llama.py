# The presets as they are: learned positions, LayerNorm and GELU against RoPE, RMSNorm and SwiGLU.
question = 'How much compute does the LLaMA architecture save, and does it hold as models grow?'

ladder = {
    'n_layer': [2, 2, 3, 3],
    'n_embd': [32, 48, 48, 64],
    'n_head': [2, 3, 3, 4],
}
baseline_extra = {'n_layer': 4, 'n_embd': 64, 'n_head': 4}
horizon = {'tokens_per_param': 10}
sweep = {'arch_preset': ['legacy', 'llama'], 'seed': [1, 2, 3]}
baseline = {'arch_preset': 'legacy'}
reference = {'arch_preset': 'legacy'}

# Small enough for two CPU cores: 25 to 200 thousand parameters, bytes of Python code.
dataset = 'python_stdlib'
block_size = 64
batch_size, gradient_accumulation_steps = 16, 1
eval_interval, eval_iters = 100, 100
log_interval = 20
learning_rate = 3e-3
dtype = 'float32'
always_save_checkpoint = False
out_dir = 'out-ladder-llama'
