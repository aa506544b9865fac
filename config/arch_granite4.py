# Granite 4.0 (IBM 2025) with the H-Tiny model's ratios: Mamba-2 (M) in nine of ten layers,
# attention without positions (A) in the sixth; 6 of 32 experts (64 in the original) and 2 shared
# ones per token; multipliers of embeddings, of the outputs of sublayers, of scores and of logits.
# 12 layers × 768 wide: 322,578,712 parameters, of which a token uses 138,553,624 (llama:
# 162,220,800).
arch_preset = 'granite4'

out_dir = 'out-granite4'
dataset = 'shakespeare'
