"""What the lessons of this folder claim, show and refuse."""
