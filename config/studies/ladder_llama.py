# The presets as they are: learned positions, LayerNorm and GELU against RoPE, RMSNorm and SwiGLU.
question = 'How much compute does the LLaMA architecture save, and does it hold as models grow?'

ladder = {
    'n_layer': [2, 2, 3, 3],
    'n_embd': [32, 48, 48, 64],
    'n_head': [2, 3, 3, 4],
}
baseline_extra = 0  # the baseline is the better one: its rungs reach the losses of the other
horizon = {'tokens_per_param': 10}
sweep = {'arch_preset': ['llama', 'legacy'], 'seed': [1, 2, 3]}
baseline = {'arch_preset': 'llama'}
reference = {'arch_preset': 'legacy'}  # whose parameters are counted

# Small enough for two CPU cores: 25 to 150 thousand parameters, bytes of Python code.
dataset = 'python_stdlib'
block_size = 64
batch_size, gradient_accumulation_steps = 16, 1
eval_interval, eval_iters = 100, 100
log_interval = 20
learning_rate = 3e-3
dtype = 'float32'
always_save_checkpoint = False
out_dir = 'out-ladder-llama'
