"""What the lessons of lecture 01 and CODE 01 claim, and how it is measured."""
