# The design document's GPT-2: learned positions, LayerNorm without bias after each part, GELU,
# no biases, tied head. 12 layers × 768 wide: 124,372,992 parameters. OpenAI's own GPT-2, which is
# pre-norm and has biases, is arch_preset = 'legacy' (config/train_gpt2.py).
arch_preset = 'gpt2'

out_dir = 'out-gpt2'
dataset = 'shakespeare'
