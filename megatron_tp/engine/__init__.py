"""The fast versions, which the combined run uses."""
