"""The fast runtime, and what builds, checks, times and searches schedules."""
