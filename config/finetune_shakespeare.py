# Finetune GPT-2's pretrained weights on Shakespeare at a low, constant rate, as in nanoGPT.
# They are taken from the local Hugging Face cache or downloaded (pip install '.[hub]').
# Parameters, download size, and GPU memory of this run in bfloat16 (by --plan):
# gpt2 124 M, 0.5 GB, 3.2 GB · gpt2-medium 355 M, 1.5 GB, 8.0 GB · gpt2-large 774 M, 3.2 GB, 16.4 GB
# gpt2-xl (as in nanoGPT) 1558 M, 6.4 GB, 31.7 GB
init_from = 'gpt2'

out_dir = 'out-shakespeare-finetuned'
dataset = 'shakespeare'

# 1 sequence × 32 micro-steps × 1024 tokens = 32,768 tokens per iteration, 9 iterations per epoch.
# --block_size=256 needs a quarter of the activation memory and of the time.
batch_size = 1
gradient_accumulation_steps = 32

max_iters = 20
learning_rate = 3e-5
decay_lr = False
dropout = 0.1

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
