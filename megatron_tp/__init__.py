"""Lectures 04, 05 and CODE 02: tensor parallelism inside a layer."""
