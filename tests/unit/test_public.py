"""The public face and the rules of the house, read from the source."""

import ast
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

import isoflat
from isoflat.measures.catalogue import find_measure, geometries, measures

SOURCE = Path(isoflat.__file__).parent


@cache
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
        "BatchLoss", "Budget", "CheckpointError", "Comparison", "Cost", "DataError", "Estimate", "Found",
        "IsoflatError", "Kind", "LayerScale", "Measure", "NoInvariantGeometry", "NonFinite", "NondeterministicRisk",
        "Point", "Preconditioned", "Quotient", "RankLost", "RanksDiffer", "Record", "Settings", "Spectrum",
        "SymmetryViolated", "Table", "UnitScale", "UnknownName", "UnsupportedModel", "UsageError",
        "UserCodeError", "__version__",
        "attack", "canonicalize", "compare", "io", "linalg", "load_data", "load_model", "measure", "measure_all",
        "reparametrize", "reproduce", "spectrum", "study", "symmetries", "verify", "write_report",
    ]  # fmt: skip
    assert sorted(measures()) == [
        "critical_sharpness", "edge_of_stability", "feature_robustness", "fisher_rao_norm", "fisher_spectral_norm", "fisher_trace",
        "gauss_newton_spectral_norm", "gauss_newton_trace", "gradient_norm", "hessian_frobenius",
        "hessian_spectral_norm", "hessian_trace", "local_learning_coefficient", "log_prior_volume", "minimum_sharpness",
        "minimum_sharpness_unitwise", "neuronwise_flatness", "normalized_sharpness", "pac_bayes_curvature_posterior",
        "pac_bayes_effective_curvature", "pac_bayes_rescaled", "preconditioned_edge_of_stability",
        "quotient_effective_rank", "quotient_frobenius",
        "quotient_largest_eigenvalue", "quotient_sharpness", "quotient_smallest_eigenvalue", "quotient_spectral_norm",
        "quotient_trace", "relative_flatness", "relative_flatness_conv", "relative_flatness_max", "riemannian_hessian_spectral_norm",
        "sa_cms", "tic",
        "tic_diagonal", "tic_trace_ratio",
    ]  # fmt: skip
    assert sorted(geometries()) == ["auto", "elementwise", "euclidean", "layerwise"]


def test_every_measure_has_a_complete_card():
    for name, measure in measures().items():
        assert find_measure(name) == measure
        for text in (measure.formula, measure.definition, measure.reference, measure.units):
            assert text.strip(), name
        assert measure.geometry is None or measure.geometry in geometries()


def test_references_have_entries():
    """Every key of a card is in `measures/references.bib`, with the card's arXiv number; nothing else is there."""
    text = (SOURCE / "measures" / "references.bib").read_text(encoding="utf-8")
    entries = dict(re.findall(r"^@\w+\{(\w+),(.*)\}$", text, flags=re.MULTILINE))
    seen = set()
    for name, measure in measures().items():
        for key, _, number in re.findall(r"\b([a-z]+\d{4})\b(, arXiv:(\d{4}\.\d{5}))?", measure.reference):
            assert key in entries, (name, key)
            assert f"eprint = {{{number}}}" in entries[key] or not number, (name, key)
            seen.add(key)
        assert seen & set(re.findall(r"\b[a-z]+\d{4}\b", measure.reference)), name
    assert seen == set(entries)


def test_solvers_never_hear_of_networks():
    for path, tree in _trees().items():
        names = set(_imports(tree))
        folder = path.relative_to(SOURCE).parts[0]
        if folder in ("linalg", "core"):
            assert not any(name.startswith("torch.nn") for name in names), path
        # pickletools takes streams apart and executes nothing.
        assert not any(name.split(".")[0] in ("pickle", "_pickle", "cloudpickle", "dill") for name in names), path
        if path.relative_to(SOURCE).as_posix() != "experiments/sweep.py":  # workers, no files
            assert not any(name.startswith("joblib") for name in names), path
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
    code = f"import sys, isoflat; isoflat.measure; print([m for m in {optional} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_measures_of_other_packages_join_the_catalogue(monkeypatch):
    """By an entry point; one that cannot be loaded, or takes a name, is left out with a warning."""
    from isoflat.measures import catalogue

    own, tic = replace(find_measure("gradient_norm"), name="somebody_elses"), find_measure("tic")

    def point(name, load):
        return SimpleNamespace(name=name, value=f"package:{name}", load=load)

    def broken():
        raise ImportError("no such module")

    points = [point("good", lambda: own), point("taken", lambda: tic), point("broken", broken)]
    points.append(point("other", lambda: 3))
    monkeypatch.setattr(catalogue, "entry_points", lambda group: points if group == "isoflat.measures" else [])
    catalogue.measures.cache_clear()
    try:
        with pytest.warns(UserWarning) as said:
            assert catalogue.measures()["somebody_elses"] is own
        words = [str(warning.message) for warning in said]
        assert len(words) == 3
        assert any("no such module" in text for text in words)
        assert any("a 'tic' already" in text for text in words)
        assert any("no isoflat.Measure" in text for text in words)
    finally:
        monkeypatch.undo()
        catalogue.measures.cache_clear()


def test_the_page_about_a_measure_of_your_own_runs():
    """Every block of Python on it, in order."""
    page = (SOURCE.parents[1] / "docs" / "howto" / "own-measure.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in page.split("```python\n")[1:]:
        exec(compile(block.partition("```")[0], "own-measure.md", "exec"), names)
    assert [row.measure for row in names["table"]] == ["curvature_per_slope", "gradient_norm"]
