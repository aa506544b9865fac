"""Estimates for a run without running it: parameters, FLOPs, memory and time."""
