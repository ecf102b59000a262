"""The fast version of expert parallelism: what `cluster` runs."""
