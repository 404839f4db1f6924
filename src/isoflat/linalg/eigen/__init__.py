"""Eigenvalues at the ends of a spectrum, with enclosures.

`lanczos` has one eigenvalue from a random start; `hard_first` has it for a sum whose first part carries most of it;
`power` is the paper's method, for comparison. `many` is what solvers for many eigenpairs share, `block_lanczos` and `lobpcg`
are two of them, and `attempt` is the run that verifies and certifies what they find. `outside` bounds what is left on a
complement, `remainder` that of one vector.
"""
