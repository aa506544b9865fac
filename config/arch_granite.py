# Granite 3.0 (IBM 2024) with the 2B model's ratios: multipliers of embeddings, of the outputs of
# sublayers, of scores and of logits; 4 query heads share keys and values, SwiGLU 4 × as wide, tied
# head. 12 layers × 768 wide: 141,282,048 parameters.
arch_preset = 'granite'

out_dir = 'out-granite'
dataset = 'shakespeare'
