"""Flatness of minima, measured so that nobody can cheat.

Names are resolved when they are first used (PEP 562), so that `import isoflat` costs little and `isoflat --help` never
loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isoflat import io, linalg
    from isoflat.core.comparison import Comparison
    from isoflat.core.errors import (
        CheckpointError,
        DataError,
        IsoflatError,
        NoInvariantGeometry,
        NondeterministicRisk,
        NonFinite,
        RankLost,
        RanksDiffer,
        SymmetryViolated,
        UnknownName,
        UnsupportedModel,
        UsageError,
        UserCodeError,
    )
    from isoflat.core.estimate import Cost, Estimate, Kind
    from isoflat.core.record import Point, Record
    from isoflat.core.spectrum import Spectrum
    from isoflat.core.table import Table
    from isoflat.experiments.attack import attack
    from isoflat.experiments.reproduce import reproduce
    from isoflat.experiments.study import study
    from isoflat.geometry.preconditioned import Preconditioned
    from isoflat.geometry.quotient import Quotient
    from isoflat.io.data import load_data
    from isoflat.io.model import load_model
    from isoflat.io.verify import verify
    from isoflat.measurement.compare import compare
    from isoflat.measurement.run import measure, measure_all
    from isoflat.measurement.spectrum import spectrum
    from isoflat.measures.base import Measure
    from isoflat.measures.settings import Budget, Settings
    from isoflat.report.write import write_report
    from isoflat.risk.losses import BatchLoss
    from isoflat.symmetry.canonical.representative import canonicalize, reparametrize
    from isoflat.symmetry.finding.discover import symmetries
    from isoflat.symmetry.found import Found
    from isoflat.symmetry.groups.declared import UnitScale
    from isoflat.symmetry.groups.scaling import LayerScale

    __version__: str

__all__ = [
    "BatchLoss",
    "Budget",
    "CheckpointError",
    "Comparison",
    "Cost",
    "DataError",
    "Estimate",
    "Found",
    "IsoflatError",
    "Kind",
    "LayerScale",
    "Measure",
    "NoInvariantGeometry",
    "NonFinite",
    "NondeterministicRisk",
    "Point",
    "Preconditioned",
    "Quotient",
    "RankLost",
    "RanksDiffer",
    "Record",
    "Settings",
    "Spectrum",
    "SymmetryViolated",
    "Table",
    "UnitScale",
    "UnknownName",
    "UnsupportedModel",
    "UsageError",
    "UserCodeError",
    "__version__",
    "attack",
    "canonicalize",
    "compare",
    "io",
    "linalg",
    "load_data",
    "load_model",
    "measure",
    "measure_all",
    "reparametrize",
    "reproduce",
    "spectrum",
    "study",
    "symmetries",
    "verify",
    "write_report",
]

_NAMES = {
    "core.comparison": ("Comparison",),
    "core.errors": (
        "CheckpointError",
        "DataError",
        "IsoflatError",
        "NoInvariantGeometry",
        "NonFinite",
        "NondeterministicRisk",
        "RankLost",
        "RanksDiffer",
        "SymmetryViolated",
        "UnknownName",
        "UnsupportedModel",
        "UsageError",
        "UserCodeError",
    ),
    "core.estimate": ("Cost", "Estimate", "Kind"),
    "core.record": ("Point", "Record"),
    "core.spectrum": ("Spectrum",),
    "core.table": ("Table",),
    "experiments.attack": ("attack",),
    "experiments.reproduce": ("reproduce",),
    "experiments.study": ("study",),
    "geometry.preconditioned": ("Preconditioned",),
    "geometry.quotient": ("Quotient",),
    "io.data": ("load_data",),
    "io.model": ("load_model",),
    "io.verify": ("verify",),
    "measurement.compare": ("compare",),
    "measurement.run": ("measure", "measure_all"),
    "measurement.spectrum": ("spectrum",),
    "measures.base": ("Measure",),
    "measures.settings": ("Budget", "Settings"),
    "report.write": ("write_report",),
    "risk.losses": ("BatchLoss",),
    "symmetry.canonical.representative": ("canonicalize", "reparametrize"),
    "symmetry.finding.discover": ("symmetries",),
    "symmetry.found": ("Found",),
    "symmetry.groups.declared": ("UnitScale",),
    "symmetry.groups.scaling": ("LayerScale",),
}
"""Public names by the module that defines them, the same as in the imports for type checkers above."""

_HOMES = {name: f"isoflat.{module}" for module, names in _NAMES.items() for name in names}

_PACKAGES = ("io", "linalg")
"""Subpackages that are public by themselves."""


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name in _HOMES:
        found = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _PACKAGES:
        found = importlib.import_module(f"isoflat.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        found = version("isoflat")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the public names too that were not used yet."""
    return sorted({*globals(), *__all__})
