"""The combined run."""
