"""Groups that leave the network's function unchanged: found by tracing, proved, and quotiented out.

Finding: `graph` traces, `rules` relate the units of what goes in and comes out of each operation, `constraints` is written to,
`relations` solves, `means` looks for readers that subtract a mean, `discover` is the way through.
Groups: `base` says what one is; `units` scales, `translation` shifts, `scaling` is the paper's chain of layers, `declared`
a user's claim. `found` holds what one network has, applies and proves it; `report` puts it into lines.
Quotient: `slices` puts constants in their places, `folds` fixes what is fixed, `potential` balances the rest;
`canonical` is the point they lead to.
"""
