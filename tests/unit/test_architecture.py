"""Rules of the house that a linter does not know: no cycles, one class per name, docstrings that read alone."""

import ast
from collections import defaultdict
from pathlib import Path

import grimp
import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

import isoflat

SOURCE = Path(isoflat.__file__).parent

FRAGMENTS = ("Of", "As", "What", "That", "Those", "By", "Whether", "How")
"""Words that begin a fragment, which only the lines around it complete."""


def _knots(imports):
    """Sets of modules of which each reaches each other one."""
    names = sorted({*imports, *(other for others in imports.values() for other in others)})
    place = {name: number for number, name in enumerate(names)}
    edges = [(place[one], place[other]) for one, others in imports.items() for other in others]
    rows, columns = np.array(edges).reshape(-1, 2).T
    matrix = csr_matrix((np.ones(len(edges)), (rows, columns)), (len(names), len(names)))
    _, labels = connected_components(matrix, connection="strong")
    found = defaultdict(list)
    for name, label in zip(names, labels, strict=True):
        found[label].append(name)
    return [knot for knot in found.values() if len(knot) > 1]


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions and for type checkers count: they hide a cycle, they do not remove it."""
    graph = grimp.build_graph("isoflat", cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert len(imports) > 100
    assert "isoflat.core.estimate" in imports["isoflat.core.record"]
    assert _knots({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert _knots(imports) == []


def _definitions(kinds):
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield path.relative_to(SOURCE).as_posix(), node


def test_a_class_name_has_one_meaning():
    """A leading underscore makes no second meaning."""
    places = defaultdict(set)
    for path, node in _definitions(ast.ClassDef):
        places[node.name.lstrip("_")].add(path)
    assert len(places) > 100
    assert {name: sorted(paths) for name, paths in places.items() if len(paths) > 1} == {}


def test_docstrings_read_alone():
    """A stranger sees them one at a time."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    seen, wrong = 0, []
    for path, node in _definitions(kinds):
        text = ast.get_docstring(node)
        if text:
            seen += 1
            if text.split(maxsplit=1)[0].rstrip(",:;.") in FRAGMENTS:
                wrong.append(f"{path}:{getattr(node, 'lineno', 1)} {text.splitlines()[0]}")
    assert seen > 1000
    assert wrong == []
