"""Metrics on the weights, as orthonormal frames.

`euclidean` is `E = I`; `layerwise` is the paper's `E = blockdiag(‖W_i‖ I)`; `quotient` splits tangent vectors of the
latter into what a group moves and what it does not; `canonical` (`auto`) is `D` at the canonical representative of the
orbit under every symmetry that tracing finds, seen from the weights as they are.
"""
