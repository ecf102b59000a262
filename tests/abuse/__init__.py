"""Load and abuse of every script, run by hand: minutes to hours, so no part of the suite."""
