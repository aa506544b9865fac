# Gemma 2 (Gemma Team 2024) with the 2B model's ratios: norms before and after each sublayer, a
# window of half the context in every other layer, soft caps of scores and logits, GEGLU 4 × as
# wide, tied head. 12 layers × 768 wide: 144,839,424 parameters.
arch_preset = 'gemma2'

out_dir = 'out-gemma2'
dataset = 'shakespeare'
