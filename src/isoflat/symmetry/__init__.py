"""Groups that leave the network's function unchanged: found by tracing it, proved on it, and divided out.

Groups (`groups/`): `base` says what one is; `units` scales units, `translation` shifts constants, `basis` changes bases,
`scaling` is the paper's chain of layers, `declared` a user's own claim. `motions` says how stored tensors move in terms of
unknowns, `relations` holds these unknowns and solves for them.
Finding (`finding/`): `graph` traces, `rules` relate the units of what goes in and comes out of each operation and write
`constraints`, `solve` makes groups of them, `bases` finds changes of basis, `means` common vectors, `gains` the gains that
can be folded; `masks` tells stored masks from tensors that can be moved, `averages` where constants pass attention,
`untraceable` what cannot be traced; `discover` is the way through. `found` holds the groups of one network and applies them,
`proof` proves them.
Representative (`canonical/`): `shift_gauge` puts constants in their places, `gain_folding` fixes statistics and gains,
`potential`, `balance` and `joint` balance scales and bases; `representative` is the point they lead to.
"""
