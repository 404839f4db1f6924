"""Spectral densities from random probes, with bands that hold for the whole spectrum at once.

`gauss` bounds what one probe saw, `counts` says what that tells about numbers of eigenvalues, `lanczos` is the solver,
and `outliers` finds what is better taken out before probes are drawn.
"""
