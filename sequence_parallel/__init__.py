"""Lecture 06: Megatron sequence parallelism and activation recomputation; sequences cut with attention included."""
