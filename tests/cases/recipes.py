"""Recipes that run in every process of a group."""

from pathlib import Path

from cases.group import Answer, attempt
from isoflat.experiments.recipe import parse_recipe
from isoflat.experiments.reproduce import reproduce
from isoflat.risk.ranks import Ranks


def reproduced(text: str, folder: str) -> list:
    """A recipe followed by all processes: labels, divergences, and hashes and values of what was measured."""
    result = reproduce(parse_recipe(text, "tiny"), out=Path(folder))
    told = [(n.label, n.diverged, [(r.model_hash, r.estimate.value) for r in n.table]) for n in result.networks]
    assert Ranks.here().gather(told) == [told] * Ranks.here().world
    return told


def given_workers(text: str, folder: str) -> Answer:
    """What becomes of a recipe that is to have workers where several processes share every network."""
    return attempt(lambda: reproduce(parse_recipe(text, "tiny"), out=Path(folder), jobs=2))
