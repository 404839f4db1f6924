"""Sharpness in units of what gradient descent can follow."""

from collections.abc import Mapping

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.linalg.eigen.extremes import Which
from isoflat.measures.base import Findings, Measure, Question
from isoflat.measures.entries.eigenvalues import eigenvalue, extremes
from isoflat.measures.settings import Settings


def _needs(settings: Settings, options: Mapping[str, float]) -> tuple[Question, ...]:
    if not options["learning_rate"] > 0 or not 0 <= options["momentum"] < 1:
        raise UsageError(
            "edge_of_stability needs the learning rate of training, and a momentum from 0 to below 1: "
            f"edge_of_stability(learning_rate=0.1), got {options['learning_rate']:g} and {options['momentum']:g}"
        )
    return extremes(Which.LARGEST)(settings, options)


def _evaluate(findings: Findings) -> Estimate:
    rate, momentum = findings.options["learning_rate"], findings.options["momentum"]
    return eigenvalue(findings).scaled(rate / (2 + 2 * momentum))


MEASURE = Measure(
    name="edge_of_stability",
    formula=r"\eta\, \lambda_{\max}(\nabla^2 L) / (2 + 2\beta)",
    definition="Largest curvature over the largest that descent with this learning rate and momentum can follow: 1 at the edge.",
    reference="cohen2021, arXiv:2103.00065; cohen2022, arXiv:2207.14484",
    units="none (1 is the edge)",
    needs=_needs,
    evaluate=_evaluate,
    geometry="euclidean",
    options={"learning_rate": 0.0, "momentum": 0.0},
    pitfalls=(
        "For full-batch gradient descent with heavy-ball momentum β and for a loss that is a mean. Rescaling moves it, and "
        "that is right: it moves what gradient descent does as well."
    ),
)
