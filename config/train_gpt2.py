# nanoGPT's GPT-2 (124M) run: OpenAI's GPT-2 architecture on OpenWebText, for 8 GPUs of 40 GB.
# Prepare the data first (nanoGPT's train.bin and val.bin work without conversion).
arch_preset = 'legacy'
bias = False

out_dir = 'out-gpt2-124m'
dataset = 'openwebtext'

# 12 sequences × 1024 tokens × 40 micro-steps (5 on each of 8 GPUs) = 491,520 tokens per iteration
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 600,000 iterations × 491,520 tokens ≈ 295 B tokens
max_iters = 600000
lr_decay_iters = 600000
warmup_iters = 2000

eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 0.1
