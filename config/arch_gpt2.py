# GPT-2's components with post-norm: learned positions, LayerNorm without bias after each sublayer,
# GELU, no biases, tied head. 12 layers × 768 wide: 124,372,992 parameters. This is not OpenAI's
# GPT-2, which is pre-norm and has biases: that is the preset `legacy` (config/train_gpt2.py).
arch_preset = 'gpt2'

out_dir = 'out-gpt2'
dataset = 'shakespeare'
