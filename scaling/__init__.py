"""Statistics of ladders: architectures at several sizes, with numpy."""
