"""What the lessons of CODE 04 claim, and how it is measured."""
