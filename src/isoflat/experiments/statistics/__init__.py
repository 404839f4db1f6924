"""Statistics of whether a measure predicts generalisation over many trained networks, one in each file."""
