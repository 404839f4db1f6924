"""Training and experiments: data, model families, loops, verdicts."""
