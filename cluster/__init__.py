"""Lectures 02 and 03: ranks, topology, rules, the planner, and the combined run."""
