"""Eigenvalues at the ends of a spectrum, with enclosures.

`lanczos` has one eigenvalue from a random start; `hard_first` has it for a sum whose first part carries most of it;
`power` is the paper's method, for comparison. `block_lanczos` searches for many eigenpairs, and `attempt` is the run that
verifies and certifies what it finds. `complement` bounds the rest of the spectrum on the complement of found vectors,
`remainder` does so for one vector, and `recheck` looks at a stored eigenvector again.
"""
