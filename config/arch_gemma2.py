# Gemma 2 (Gemma Team 2024) in the 2B model's ratios: norms on both sides of each part, a window of
# half of the context in every other layer, soft caps on scores and logits, GEGLU 4 × as wide, tied
# head. 12 layers × 768 wide: 144,839,424 parameters. The cap on scores needs attention_backend
# 'manual' or, on a GPU, 'flex'.
arch_preset = 'gemma2'

out_dir = 'out-gemma2'
dataset = 'shakespeare'
