"""The catalogue: one file for each measure, and what several of them share."""
