# GPT-2's weights, trained on with Shakespeare's works at a low and constant rate, as nanoGPT does.
# They come from Hugging Face's cache on this machine or are downloaded (pip install safetensors).
# Parameters, the download, and what a GPU needs for this run in bfloat16 by --plan:
# gpt2 124 M, 0.5 GB, 3.2 GB · gpt2-medium 355 M, 1.5 GB, 8.0 GB · gpt2-large 774 M, 3.2 GB, 16.4 GB
# gpt2-xl, which nanoGPT takes, 1558 M, 6.4 GB, 31.7 GB
init_from = 'gpt2'

out_dir = 'out-shakespeare-finetuned'
dataset = 'shakespeare'

# 1 sequence × 32 micro-steps × 1024 tokens = 32,768 tokens an update: 9 updates an epoch.
# --block_size=256 takes a quarter of the memory of activations, and of the time.
batch_size = 1
gradient_accumulation_steps = 32

max_iters = 20
learning_rate = 3e-5
decay_lr = False
dropout = 0.1

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
