"""CODE 04: expert parallelism."""
