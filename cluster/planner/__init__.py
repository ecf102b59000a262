"""Which layouts are legal, what they hold and send, and how long a step takes."""
