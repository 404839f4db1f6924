"""Options and what a terminal of 80 columns shows: nothing is cut off, nothing collapses, and signs of life come at once."""

import inspect
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from typing import Annotated

import pytest
import torch
import typer
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from isoflat.cli.attack import NUMBERS, PLACES
from isoflat.cli.main import app
from isoflat.cli.options import ComputeOptions, MeasureOptions, NetworkOptions, OutputOptions, takes
from isoflat.core.fitted import FittedTable
from isoflat.experiments.numbers import GEOMETRIES, MEASURES
from isoflat.measures.catalogue import geometries, measures

WIDTH = 80
GROUPS = {
    "measure": (NetworkOptions, MeasureOptions, ComputeOptions, OutputOptions),
    "compare": (NetworkOptions, MeasureOptions, ComputeOptions, OutputOptions),
    "spectrum": (NetworkOptions, ComputeOptions, OutputOptions),
    "attack": (NetworkOptions,),
    "symmetries": (NetworkOptions,),
    "canonicalize": (NetworkOptions,),
    "doctor": (NetworkOptions,),
}
ABSENT = {"measure": {"report"}, "spectrum": {"report"}, "compare": {"weights"}}
"""Fields of these groups that a verb leaves out."""


def narrow(*arguments, width=WIDTH):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width)})


def too_long(text, width=WIDTH):
    return [line for line in text.splitlines() if cell_len(line) > width]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a model factory and two checkpoints of it."""
    (tmp_path / "narrow_nets.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("narrow_nets", None)
    from narrow_nets import build

    torch.manual_seed(0)
    save_file(build().state_dict(), tmp_path / "best.safetensors")
    return tmp_path


def test_the_list_shows_name_definition_and_invariances_of_every_measure():
    result = narrow("measures")
    assert result.exit_code == 0, result.output
    assert too_long(result.stdout) == []
    words = " ".join(result.stdout.split())
    for entry in measures().values():
        start = f" {words}".index(f" {entry.label} ")
        own = words[start:].partition(" invariant ")[0]
        assert entry.definition.split(":")[0].rstrip(".") in own, entry.name
    assert words.count("invariant to:") + words.count("as invariant as") == len(measures()) + len(geometries())


@pytest.mark.parametrize("width", [40, 60, WIDTH])
def test_measure_fits_a_narrow_terminal(folder, width):
    asked = ("--measure", "quotient_spectral_norm", "--measure", "gradient_norm", "--geometry", "layerwise")
    result = narrow(
        "measure", "--model", "narrow_nets:build", "--data", "digits", "--examples", "60", "--weights", "best.safetensors",
        *asked, width=width,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert too_long(result.stdout, width) == []
    for word in ("quotient_spectral_norm", "gradient_norm", "interval", "stationarity", "Hessian-vector"):
        assert word in result.stdout
    assert "loaded narrow_nets:build" in result.stderr  # no terminal: a line for each phase
    assert "measuring quotient_spectral_norm" in result.stderr


def test_rows_never_cut_a_number_and_lose_no_cell():
    heads = ("network", "a long head of a column", "value", "interval", "another interval")
    cells = [
        (f"small batch {k}", "0.001", f"{k}39.27(7)", f"[{k}39.27400012, {k}39.30800012]", f"[{k}.1e+300, {k}.2e+300]")
        for k in range(1, 4)
    ]
    for width in range(20, 161, 7):
        screen = Console(width=width, color_system=None)
        with screen.capture() as captured:
            screen.print(FittedTable(heads, cells, "Title"))
        text = captured.get()
        assert too_long(text, width) == []
        for word in {word for row in cells for cell in row[1:] for word in cell.split()}:
            assert word in text or cell_len(word) > width - 30, (width, word)
    assert FittedTable(heads, cells).widths(160, 2) is not None
    assert FittedTable(heads, cells).widths(40, 1) is None


@pytest.mark.parametrize("verb", GROUPS)
def test_help_lists_every_option_of_its_groups_with_its_default(verb):
    result = narrow(verb, "--help", width=200)
    assert result.exit_code == 0, result.output
    for group in GROUPS[verb]:
        hints = inspect.get_annotations(group, eval_str=True)
        for part in fields(group):
            if part.name in ABSENT.get(verb, ()):
                continue
            (option,) = hints[part.name].__metadata__
            lines = [line for line in result.stdout.splitlines() if f" {option.default.split('/')[0]} " in line]
            assert lines, (verb, part.name)
            if part.default not in (None, MISSING, False, True):
                assert f"[default: {part.default}]" in " ".join(result.stdout.split()), (verb, part.name)


def test_no_option_of_a_group_is_without_help():
    for group in (NetworkOptions, MeasureOptions, ComputeOptions, OutputOptions):
        for hint in inspect.get_annotations(group, eval_str=True).values():
            (option,) = hint.__metadata__
            assert option.help and option.help[0].isalnum() and option.help.endswith("."), option


def test_takes_passes_what_is_typed_and_keeps_the_rest():
    @dataclass(frozen=True)
    class Group:
        one: Annotated[int, typer.Option("--one")]
        two: Annotated[str, typer.Option("--two")] = "b"
        three: Annotated[list[str] | None, typer.Option("--three")] = None

    seen = []

    @takes(Group, "group", without=("three",), two="c")
    def verb(before: Annotated[int, typer.Option()] = 1, *, group: Group, after: bool = False) -> None:
        seen.append((before, group, after))

    assert list(inspect.signature(verb).parameters) == ["before", "one", "two", "after"]
    small = typer.Typer()
    small.command()(verb)
    assert CliRunner().invoke(small, ["--one", "3", "--after"]).exit_code == 0
    assert CliRunner().invoke(small, ["--one", "4", "--two", "d", "--before", "2"]).exit_code == 0
    assert seen == [(1, Group(3, "c"), True), (2, Group(4, "d"), False)]
    assert CliRunner().invoke(small, []).exit_code == 2


def test_the_attack_of_the_command_line_is_that_of_the_library():
    assert (tuple(NUMBERS), tuple(PLACES)) == (MEASURES, GEOMETRIES)


@pytest.mark.parametrize(
    ("typed", "heavy"),
    [
        (["--help"], ["torch", "numpy", "scipy", "pydantic", "matplotlib", "jinja2"]),
        (["measure", "--help"], ["torch", "numpy", "scipy", "matplotlib", "jinja2"]),  # typer itself asks for pydantic
    ],
)
def test_help_imports_no_heavy_library(typed, heavy):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom isoflat.cli.main import app\n"
        f"assert CliRunner().invoke(app, {typed}).exit_code == 0\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
