# A GPT-2-sized model on Shakespeare in GPT-2 tokens (about 300,000 of them): quick to start, and
# quick to overfit. Good for trying things out.
arch_preset = 'legacy'

out_dir = 'out-shakespeare'
dataset = 'shakespeare'

# 1 sequence × 32 micro-steps × 1024 tokens = 32,768 tokens an update: 9 updates an epoch
batch_size = 1
gradient_accumulation_steps = 32

max_iters = 200
eval_interval = 50
learning_rate = 3e-4
dropout = 0.1
