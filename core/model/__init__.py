"""The reference model, its data and its random numbers."""
