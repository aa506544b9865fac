# Published architectures, each with its best learning rate, at the training FLOPs of 600 iterations
# of `legacy`.
question = 'Which published architecture learns most from the same training FLOPs?'

sweep = {
    'arch_preset': ['legacy', 'gpt2', 'hybrid', 'llama', 'qwen3', 'gemma2', 'olmo2', 'pythia'],
    'seed': [1, 2, 3],
}
baseline = {'arch_preset': 'legacy'}
tune = {'learning_rate': [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]}
budget = {'flops': 2.3e12}  # attention counted over the causal half

# Small enough for two CPU cores: 4 layers, n_embd 128, 64 characters of context, 768 per iteration.
dataset = 'shakespeare_char'
n_layer, n_head, n_embd, block_size = 4, 4, 128, 64
batch_size, gradient_accumulation_steps = 12, 1
eval_interval, eval_iters = 100, 300
log_interval = 20
dtype = 'float32'
always_save_checkpoint = False
out_dir = 'out-study-presets'
