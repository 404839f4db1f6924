"""The PAC-Bayes bound of Pitas: the best mean-field posterior for a quadratic loss, in closed form."""

from __future__ import annotations

from isoflat.core.estimate import Estimate
from isoflat.measures.base import Findings, Measure
from isoflat.measures.entries.pac_bayes import BOUNDED, bound_terms, catoni, curvature_posterior

NAME = "pac_bayes_curvature_posterior"


def _evaluate(findings: Findings) -> Estimate:
    terms, options = findings.answers[0].result, findings.options
    complexity = curvature_posterior(terms, options["sigma"], options["beta"])
    return Estimate.exact(catoni(complexity, terms.rows, options["delta"], options["beta"]))


MEASURE = Measure(
    name=NAME,
    formula=(
        r"\frac{1}{\beta N}\Big[\frac12 \sum_j \ln(1 + \beta N h_{jj}\sigma^2) + \frac{\|\theta - \theta_0\|^2}{2\sigma^2} "
        r"+ \ln\frac1\delta\Big] + \frac{\beta}{8} "
        r"= \min_s \frac12 \sum_j h_{jj} s_j + \frac{\mathrm{KL}(\mathcal N(\theta, \mathrm{diag}\, s) \,\|\, "
        r"\mathcal N(\theta_0, \sigma^2 I)) + \ln(1/\delta)}{\beta N} + \frac{\beta}{8}"
    ),
    definition=(
        "By how much the expected loss of weights around these may exceed the training loss here, if the loss is quadratic: "
        "each weight as uncertain as is best, 1/s = βN h + 1/σ², under a prior around the weights before training."
    ),
    reference="pitas2019, arXiv:1909.03009",
    units="loss, for losses in [0, 1]",
    loss_degree=None,
    needs=bound_terms(NAME),
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset(),
    provisional=(
        "The posterior follows from the quadratic model and has the form we know of the paper, where β stands for our 1/(βN); "
        "which constants its bound has, and which blocks of the Hessian it takes beside the diagonal, is unverified."
    ),
    options={"sigma": 0.1, "beta": 1.0, "delta": 0.05},
    pitfalls=(
        f"{BOUNDED} beta, too, must be chosen without the data. h is the Gauss-Newton matrix's diagonal: the Hessian's where "
        "the network is piecewise linear. Third and higher derivatives are left out. "
        "Rescaling moves it, and so does reordering units: the weights before training stay where they are; "
        "pac_bayes_rescaled takes the best of all scales."
    ),
    prior=True,
)
