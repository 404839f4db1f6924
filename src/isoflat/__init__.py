"""How flat is this minimum, when nobody can cheat?"""

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
)
from isoflat.core.estimate import Cost, Estimate, Kind
from isoflat.core.record import Point, Record
from isoflat.core.spectrum import Spectrum
from isoflat.core.table import Table
from isoflat.geometry.preconditioned import Preconditioned
from isoflat.geometry.quotient import Quotient
from isoflat.measures.base import Budget, Measure
from isoflat.measures.compare import compare
from isoflat.measures.run import measure, measure_all
from isoflat.measures.spectrum import spectrum
from isoflat.risk.losses import BatchLoss
from isoflat.symmetry.canonical import canonicalize, reparametrize
from isoflat.symmetry.declared import UnitScale
from isoflat.symmetry.discover import symmetries
from isoflat.symmetry.found import Found
from isoflat.symmetry.scaling import LayerScale

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
    "Spectrum",
    "SymmetryViolated",
    "Table",
    "UnitScale",
    "UnknownName",
    "UnsupportedModel",
    "UsageError",
    "canonicalize",
    "compare",
    "measure",
    "measure_all",
    "reparametrize",
    "spectrum",
    "symmetries",
]
