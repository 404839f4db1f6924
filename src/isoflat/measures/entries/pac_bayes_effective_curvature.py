"""The PAC-Bayes bound of Li and others: directions count that are sharper than the prior."""

from __future__ import annotations

from isoflat.core.estimate import Estimate
from isoflat.measures.base import Findings, Measure
from isoflat.measures.entries.pac_bayes import BOUNDED, bound_terms, effective_curvature, mcallester

NAME = "pac_bayes_effective_curvature"


def _evaluate(findings: Findings) -> Estimate:
    terms, sigma = findings.answers[0].result, findings.options["sigma"]
    sharper = int((terms.curvature * sigma**2 > 1).sum())
    note = f"{sharper} of {len(terms.curvature)} weights have more curvature than the prior"
    return Estimate.exact(mcallester(effective_curvature(terms, sigma), terms.rows, findings.options["delta"]), note)


MEASURE = Measure(
    name=NAME,
    formula=(
        r"\sqrt{\frac{K + \ln(2\sqrt{N}/\delta)}{2N}}, \quad "
        r"K = \frac12 \sum_j \ln\max(h_{jj}\sigma^2, 1) + \frac{\|\theta - \theta_0\|^2}{2\sigma^2}"
    ),
    definition=(
        "By how much the expected loss of weights around these may exceed their training loss: each weight is as uncertain as "
        "its curvature allows, at most as under a prior around the weights before training."
    ),
    reference="li2019, arXiv:1907.10732",
    units="loss, for losses in [0, 1]",
    loss_degree=None,
    needs=bound_terms(NAME),
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset(),
    provisional=(
        "The posterior (inverse variance max(h_jj, 1/σ²)) and K are the paper's as we know them, unverified; which form of the "
        "bound it uses, and its constants, are uncertain: the one here is McAllester's with Maurer's constant."
    ),
    options={"sigma": 0.1, "delta": 0.05},
    pitfalls=(
        f"{BOUNDED} h is the Gauss-Newton matrix's diagonal: the Hessian's where the network is piecewise linear. Rescaling "
        "moves it unless the prior is moved along, and so does reordering units: the weights before training stay where they "
        "are. The expected training loss of the posterior is not part of the number."
    ),
    prior=True,
)
