"""The list of faults fits the source: each can be applied, and leaves a file that can be read."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "mutants"))
try:
    from listed import FAULTS
    from run import mutated
finally:
    sys.path.pop(0)


def test_every_fault_can_be_applied():
    for fault in FAULTS:
        ast.parse(mutated((ROOT / "src" / "isoflat" / fault.file).read_text(), fault), fault.file)


def test_every_fault_names_tests_that_are_there():
    for fault in FAULTS:
        assert fault.tests
        for each in fault.tests:
            path, _, test = each.partition("::")
            text = (ROOT / "tests" / path).read_text()
            assert not test or f"def {test.partition('[')[0]}(" in text, each


def test_no_fault_is_listed_twice():
    assert len(set(FAULTS)) == len(FAULTS) >= 60


def test_what_does_not_fit_is_refused():
    fault = FAULTS[0]
    for source in ("", fault.old * 2):
        with pytest.raises(ValueError, match="once"):
            mutated(source, fault)
