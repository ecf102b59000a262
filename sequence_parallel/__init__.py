"""Lecture 06: Megatron sequence parallelism and activation recomputation; context parallelism for long sequences."""
