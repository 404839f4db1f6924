"""Everything isoflat refuses, as one tree.

```
IsoflatError
├── UsageError (also ValueError)      an argument is wrong
│   ├── UnknownName                   no measure, geometry or verb of that name; the nearest are offered
│   ├── DataError                     the data cannot be measured on: empty, one-shot, no targets, wrong file
│   ├── UserCodeError (also RuntimeError) the user's model, loss or data raised an exception
│   └── CheckpointError               weights do not fit the model, or the file cannot be opened safely
├── UnsupportedModel                  the network is in a mode or has a part that has no exact Hessian here
├── NondeterministicRisk              two passes over the same data differ: shuffling, augmentation, dropout
├── RanksDiffer                       processes that share a measurement were not given the same
├── RankLost                          one of these processes ended, or hangs
├── NonFinite                         NaN or infinity in weights, loss, gradient or a product
├── NoInvariantGeometry               no metric of the requested kind is available for this network
└── SymmetryViolated                  a claimed symmetry changes the network's output
```

Every message says what was expected, what came, where, and what to do. Failing to converge is not an error:
it is `Estimate.converged == False`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IsoflatError(Exception):
    """Root of all errors raised on purpose by isoflat."""


class UsageError(IsoflatError, ValueError):
    """An argument has the wrong type, shape or value."""


class UnknownName(UsageError):
    """A name is not in the catalogue it was looked up in.

    >>> raise UnknownName("measure", "quotient_norm", ["quotient_spectral_norm", "hessian_trace"])
    Traceback (most recent call last):
    isoflat.core.errors.UnknownName: unknown measure 'quotient_norm'. Did you mean quotient_spectral_norm?
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], meant: Iterable[str] = ()) -> None:
        known = sorted(known)
        nearest = list(meant) or difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"Did you mean {', '.join(nearest)}?" if nearest else f"Known: {', '.join(known)}."
        super().__init__(f"unknown {kind} {name!r}. {hint}")


class DataError(UsageError):
    """The data cannot be measured on."""


class UserCodeError(UsageError, RuntimeError):
    """The user's own model, loss or data raised an exception, which is the cause of this one."""


class CheckpointError(UsageError):
    """A weights file does not fit the model or cannot be opened safely."""


class UnsupportedModel(IsoflatError):
    """The network has a mode or a part for which no exact Hessian product exists here."""


class NondeterministicRisk(IsoflatError):
    """The empirical risk is not a function of the weights: two passes over the data differ."""


class RanksDiffer(IsoflatError):
    """Processes that share a measurement have different weights, data or settings."""


class RankLost(IsoflatError):
    """A process that shares the measurement ended, or did not answer in time."""


class NonFinite(IsoflatError):
    """NaN or infinity where a finite number is needed."""


class NoInvariantGeometry(IsoflatError):
    """No metric of the requested kind is available for this network."""


class SymmetryViolated(IsoflatError):
    """A claimed symmetry changes the network's output."""
