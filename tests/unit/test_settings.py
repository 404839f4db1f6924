"""Settings stand once: every driver's signature, help text and refusals come from one record."""

import inspect
from dataclasses import fields

import pytest
import torch

import isoflat
from isoflat import Budget, Settings, UsageError
from isoflat.measurement.verify import verify_all
from isoflat.measures.settings import Keywords, SharedKeywords

NAMES = [item.name for item in fields(Settings)]
DATA = torch.eye(2), torch.eye(2)[:, :1]

MISSING = {
    isoflat.measure: set(),
    isoflat.measure_all: set(),
    isoflat.compare: set(),
    isoflat.spectrum: {"rtol", "certify", "sample", "initial"},
    verify_all: set(NAMES) - {"params", "symmetries", "device", "seed", "check"},
}
"""Fields that a driver has no use for."""


def net():
    return torch.nn.Linear(2, 1)


def test_keywords_for_type_checkers_are_the_fields():
    assert set(Keywords.__annotations__) == set(NAMES)
    assert set(SharedKeywords.__annotations__) < set(NAMES)


@pytest.mark.parametrize("driver", MISSING, ids=lambda driver: driver.__name__)
def test_every_keyword_is_seen_with_its_default_and_its_meaning(driver):
    parameters = inspect.signature(driver).parameters
    assert set(NAMES) & set(parameters) == set(NAMES) - MISSING[driver]
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    own = {"probes": 4, "confidence": 0.95} if driver is isoflat.spectrum else {}
    for item in fields(Settings):
        if item.name in parameters and item.name not in own:
            expected = None if item.name == "budget" else item.default
            assert parameters[item.name].default == expected
            assert f"        {item.name}: " in driver.__doc__
    assert "**settings" not in driver.__doc__


def test_what_a_driver_does_not_take_is_refused_by_name():
    for call in (isoflat.measure, isoflat.spectrum):
        with pytest.raises(TypeError, match="tolerance"):
            call(net(), DATA, torch.nn.MSELoss(), tolerance=1)
    with pytest.raises(TypeError, match="sample"):
        isoflat.spectrum(net(), DATA, torch.nn.MSELoss(), sample="auto")


def test_numbers_and_names_become_what_they_stand_for():
    assert Settings(budget=7).budget == Budget(products=7)
    assert Settings(budget=None).budget == Budget()
    assert Settings(check="warn").check == "warn"
    assert Settings(dtype="bfloat16", certify=False).inside is torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"check": "never"}, "refuse, warn, skip"),
        ({"rtol": 0.0}, "between 0 and 1"),
        ({"confidence": 1.0}, "strictly between"),
        ({"probes": 1}, "at least 2 probes"),
        ({"sample": "some"}, "'auto'"),
        ({"sample": "auto", "certify": False}, "drop one"),
        ({"dtype": "bfloat16"}, "never in a certificate"),
        ({"budget": 1}, "at least 2 products"),
    ],
    ids=str,
)
def test_settings_without_meaning_are_refused(wrong, words):
    with pytest.raises(UsageError, match=words):
        Settings(**wrong)
    with pytest.raises(UsageError, match=words):
        isoflat.measure(net(), DATA, torch.nn.MSELoss(), **wrong)
