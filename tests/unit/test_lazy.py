"""Public names are resolved at their first use, and everything that lists them agrees."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import isoflat

TREE = ast.parse(Path(isoflat.__file__).read_text(encoding="utf-8"))


def _typed():
    """What a type checker reads: every public name with the module it comes from."""
    guard = next(node for node in TREE.body if isinstance(node, ast.If))
    imports = [node for node in guard.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in imports for alias in node.names}


def test_table_list_and_types_agree():
    typed = _typed()
    packages = {name for name, module in typed.items() if module == "isoflat"}
    assert packages == set(isoflat._PACKAGES)
    assert {name: module for name, module in typed.items() if name not in packages} == isoflat._HOMES
    assert {*typed, "__version__"} == set(isoflat.__all__)
    assert set(isoflat.__all__) <= set(dir(isoflat))


def test_every_name_is_there():
    for name, home in isoflat._HOMES.items():
        assert getattr(isoflat, name) is getattr(importlib.import_module(home), name)
    for name in isoflat._PACKAGES:
        assert getattr(isoflat, name) is importlib.import_module(f"isoflat.{name}")
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(isoflat, "no_such_name")  # noqa: B009


def test_no_module_hides_a_public_name():
    """Importing a submodule sets an attribute of its package, so that none may be called like a public function."""
    modules = {path.stem for path in Path(isoflat.__file__).parent.iterdir() if not path.stem.startswith("__")}
    assert not modules & set(isoflat._HOMES)


def test_version_is_that_of_the_installation():
    assert isoflat.__version__ == importlib.import_module("importlib.metadata").version("isoflat")


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import isoflat; dir(isoflat); isoflat.__all__", ("torch", "numpy", "scipy", "rich", "pydantic")),
        ("import isoflat; isoflat.Estimate; isoflat.UsageError", ("torch", "numpy", "scipy", "rich")),
        (
            "import isoflat; isoflat.measure",
            (
                "scipy.stats",
                "scipy.optimize",
                "scipy.linalg",
                "scipy.sparse",
                "sklearn",
                "pydantic",
                "rich",
                "matplotlib",
                "jinja2",
                "sympy",
            ),
        ),
    ],
)
def test_heavy_modules_wait_until_they_are_needed(code, absent):
    """Every one of them would cost tenths of a second before anything is computed."""
    script = f"{code}\nimport sys\nprint(*(name for name in {absent!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
