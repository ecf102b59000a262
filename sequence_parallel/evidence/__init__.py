"""What the lessons 06 claim, and how it is measured."""
