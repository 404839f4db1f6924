"""Curvature operators of the empirical risk."""
