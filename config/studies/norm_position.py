# Xiong et al. (2020): post-norm needs warm-up, pre-norm does not. The depth scaling of initial
# weights (Radford et al. 2019) is varied too, so that its effect is not attributed to either.
question = 'Pre-norm or post-norm, with and without warm-up?'

sweep = {
    'norm_position': ['pre', 'post'],
    'warmup_iters': [0, 100],
    'depth_scaled_init': [True, False],
    'seed': [1, 2, 3],
}
baseline = {'norm_position': 'pre', 'warmup_iters': 100, 'depth_scaled_init': True}

arch_preset = 'legacy'

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
out_dir = 'out-study-norm-position'
