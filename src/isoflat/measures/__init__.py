"""The catalogue, one file per measure, and what evaluates it."""
