"""What the pipeline lessons claim, and how it is measured and drawn."""
