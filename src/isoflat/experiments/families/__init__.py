"""Networks that experiments train: one file per family, each with a `build` that depends on its arguments only."""
