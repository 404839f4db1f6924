"""Symmetric operators, the solvers that know only their products, and the certificates."""
