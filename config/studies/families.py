# Designs of released models, each scaled to the same depth (docs/families.md). Their widths give
# equal training FLOPs per token as nearly as multiples of 8 can, and the budget equal FLOPs in all.
question = 'Which published design learns most from equal training FLOPs?'

sweep = {
    'like': [
        *('llama', 'gpt2', 'opt', 'gpt_neox', 'mistral', 'qwen3', 'gemma2', 'gemma3_text'),
        *('olmo2', 'smollm3', 'mixtral', 'lfm2', 'qwen3_5_text', 'bamba', 'recurrent_gemma'),
    ],
    'seed': [1, 2, 3],
}
baseline = {'like': 'llama'}
match = 'flops'
match_by = 'n_embd'  # all of a design follows it
match_step = 8
reference = {'like': 'llama'}
like = 'llama'  # of the base
budget = {'flops': 6e11}  # attention counted over the causal half

# Small enough for one CPU core: 4 layers, n_embd 64, 256 bytes of context, 1,536 per iteration.
dataset = 'python_stdlib'
n_layer, n_embd, block_size = 4, 64, 256
batch_size, gradient_accumulation_steps = 6, 1
eval_interval, eval_iters = 100, 100
log_interval = 20
learning_rate = 3e-3
dtype = 'float32'
always_save_checkpoint = False
out_dir = 'out-study-families'
