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
from isoflat.measurement.compare import compare
from isoflat.measurement.run import measure, measure_all
from isoflat.measurement.spectrum import spectrum
from isoflat.measures.base import Measure
from isoflat.measures.settings import Budget
from isoflat.risk.losses import BatchLoss
from isoflat.symmetry.canonical.representative import canonicalize, reparametrize
from isoflat.symmetry.finding.discover import symmetries
from isoflat.symmetry.found import Found
from isoflat.symmetry.groups.declared import UnitScale
from isoflat.symmetry.groups.scaling import LayerScale

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
