"""The public face and the rules of the house, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import isoflat
from isoflat.measures.catalogue import find_measure, geometries, measures

SOURCE = Path(isoflat.__file__).parent


def _trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}


def _imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_public_names():
    """A change here is a decision."""
    assert sorted(isoflat.__all__) == [
        "BatchLoss", "Budget", "CheckpointError", "Comparison", "Cost", "DataError", "Estimate", "Found", "IsoflatError", "Kind",
        "LayerScale", "Measure", "NoInvariantGeometry", "NonFinite", "NondeterministicRisk", "Point", "Quotient",
        "RankLost", "RanksDiffer", "Record", "Spectrum", "SymmetryViolated", "Table", "UnitScale", "UnknownName",
        "UnsupportedModel", "UsageError", "canonicalize", "compare",
        "measure", "measure_all", "reparametrize", "spectrum", "symmetries",
    ]  # fmt: skip
    assert sorted(measures()) == [
        "hessian_spectral_norm", "quotient_largest_eigenvalue", "quotient_sharpness",
        "quotient_smallest_eigenvalue", "quotient_spectral_norm", "quotient_trace",
        "riemannian_hessian_spectral_norm",
    ]  # fmt: skip
    assert sorted(geometries()) == ["auto", "elementwise", "euclidean", "layerwise"]


def test_every_measure_has_a_complete_card():
    for name, measure in measures().items():
        assert find_measure(name) == measure
        for text in (measure.formula, measure.definition, measure.reference, measure.units):
            assert text.strip(), name
        assert measure.geometry is None or measure.geometry in geometries()


def test_solvers_never_hear_of_networks():
    for path, tree in _trees().items():
        names = set(_imports(tree))
        folder = path.relative_to(SOURCE).parts[0]
        if folder in ("linalg", "core"):
            assert not any(name.startswith("torch.nn") for name in names), path
        assert not any(name.startswith(("pickle", "joblib", "dill")) for name in names), path
        if path.relative_to(SOURCE).as_posix() != "risk/ranks.py":
            assert not any(name.startswith("torch.distributed") for name in names), path


def test_torch_load_is_always_weights_only_and_numpy_never_pickles():
    for path, tree in _trees().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load":
                assert keywords.get("weights_only") == "True", path
            if ast.unparse(node.func) in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle", "False") == "False", path


def test_optional_libraries_are_not_imported_at_import_time():
    optional = ("torchvision", "pyarrow", "matplotlib", "sklearn", "PIL")
    code = f"import sys, isoflat; print([m for m in {optional} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
