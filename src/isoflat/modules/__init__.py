"""A user's module while it is run: what it holds, what it writes, what it keeps for the next run."""
