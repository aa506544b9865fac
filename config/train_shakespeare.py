# A GPT-2-sized model on Shakespeare in GPT-2 tokens (about 300,000): quick to start and to overfit.
# Good for first experiments.
arch_preset = 'legacy'

out_dir = 'out-shakespeare'
dataset = 'shakespeare'

# 1 sequence × 32 micro-steps × 1024 tokens = 32,768 tokens per iteration, 9 iterations per epoch
batch_size = 1
gradient_accumulation_steps = 32

max_iters = 200
eval_interval = 50
learning_rate = 3e-4
dropout = 0.1
