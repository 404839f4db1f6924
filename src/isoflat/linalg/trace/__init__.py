"""Stochastic traces, norms and diagonals with intervals that cover; one file per algorithm.

An interval is about the probes: the products are taken as the operator computes them, and what rounding may add to
their sums is included in order of magnitude. `base` has what the algorithms share, `span` an orthonormal basis that
grows.
"""
