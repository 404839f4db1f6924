"""Groups that act on a network's tensors without changing its function: one file for each kind."""
