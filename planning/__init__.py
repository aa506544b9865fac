"""What a run would need, without running it: parameters, FLOPs, memory and time."""
