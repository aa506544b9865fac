# LFM2 (Liquid AI 2025) with the 1.2B model's ratios: gated short convolutions (S), and attention in
# 6 of 16 layers, with QK norm, 4 query heads that share keys and values, SwiGLU 4 × as wide, tied
# head. 12 layers × 768 wide: 148,378,880 parameters.
arch_preset = 'lfm2'

out_dir = 'out-lfm2'
dataset = 'shakespeare'
