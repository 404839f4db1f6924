"""Pages of docs/howto: their examples run as they stand, and every name and link in them exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

RUNNABLE = ("losses", "own-measure", "python", "solvers", "symmetries")


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_examples_of_a_page_run(name, tmp_path, monkeypatch, capsys):
    page = (ROOT / f"docs/howto/{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": name}
    for code in blocks:
        if "isoflat.testing" not in code:  # the law suite takes long; test_claims runs it on every measure
            exec(compile(code, f"{name}.md", "exec"), names)
    assert capsys.readouterr().out or name == "own-measure"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_and_links_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for name in set(re.findall(r"(?<![\w./-])isoflat(?:\.[A-Za-z_]\w*)+(?![\w/])", text)):
        assert _exists(name), name
    for module, names in re.findall(r"^ *from (isoflat[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        for name in names.split(","):
            assert _exists(f"{module}.{name.strip()}"), (module, name)


def _exists(name: str) -> bool:
    """Test whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for place, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[:place]))
            except ImportError:
                return False
    return True
