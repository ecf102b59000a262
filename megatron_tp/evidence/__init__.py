"""What the lessons claim, and how it is measured."""
