"""What connects the ranks, measured."""
