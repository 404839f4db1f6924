"""Eigenvalues at the ends of a spectrum, with enclosures.

`lanczos` has one eigenvalue from a random start; `hard_first` has it for a sum whose first part carries most of it;
`power` is the paper's method, for comparison. `pairs` is what many eigenpairs are, searched for by `block_lanczos` or
`lobpcg`, and `attempt` the run that verifies and certifies them. `outside` bounds what is left on a complement.
"""
