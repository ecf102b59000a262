"""Lecture 01 and CODE 01: data parallelism, and ZeRO, which shards what data parallelism repeats."""
