# nanoGPT's character-level Shakespeare: a small model that trains in minutes on one GPU. On a CPU:
#   python train.py config/train_shakespeare_char.py --n_layer=4 --n_head=4 --n_embd=128 \
#       --block_size=64 --batch_size=12 --max_iters=2000 --dropout=0.0
arch_preset = 'legacy'
bias = False

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'

# 64 sequences × 256 characters = 16,384 tokens per iteration
batch_size = 64
block_size = 256
gradient_accumulation_steps = 1

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

max_iters = 5000
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # a small model on little text overfits: save only improvements

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99  # few tokens per iteration: average over more of them
warmup_iters = 100
