"""Whole answers of PyHessian, curvlinops and hessian-eigenthings; each tool is imported by what prepares its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from answers import PRODUCTS, RESIDUAL, Answer, Meter, Work
from problems import CRITERION, Case
from torch import Tensor

# PyHessian


def pyhessian(case: Case, meter: Meter) -> Any:
    """Its object with the products counted; it has no seed of its own."""
    from pyhessian import hessian

    torch.manual_seed(0)
    theirs = hessian(case.model, CRITERION, dataloader=case.data, cuda=False)
    theirs.dataloader_hv_product = meter.counted(theirs.dataloader_hv_product)
    return theirs


def pyhessian_top(case: Case, meter: Meter) -> Work:
    """Power iteration until two values in a row agree to 1e-3, at most 100 steps."""
    import pyhessian as _  # noqa: F401

    def work() -> Answer:
        values, vectors = pyhessian(case, meter).eigenvalues()
        return Answer(values[0], vector=torch.cat([part.reshape(-1) for part in vectors[0]]))

    return work


def pyhessian_trace(case: Case, meter: Meter) -> Work:
    """Hutchinson until the mean moves by less than 1e-3, at most 100 probes."""
    import pyhessian as _  # noqa: F401

    def work() -> Answer:
        values = pyhessian(case, meter).trace()
        return Answer(sum(values) / len(values))

    return work


# curvlinops


def curvlinops(case: Case, meter: Meter) -> Any:
    """Its operator with the products counted, those of its own check of determinism among them."""
    from curvlinops import HessianLinearOperator

    class Counted(HessianLinearOperator):
        def _matmat(self, M: list[Tensor]) -> list[Tensor]:
            meter.count(M[0].shape[-1])
            return super()._matmat(M)

    torch.manual_seed(0)
    parameters = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    return Counted(case.model, CRITERION, parameters, case.data)


def curvlinops_top(case: Case, meter: Meter) -> Work:
    """ARPACK through SciPy."""
    import curvlinops as _  # noqa: F401
    import numpy as np
    from scipy.sparse.linalg import eigsh

    def work() -> Answer:
        start = np.random.default_rng(0).standard_normal(case.state.space.size).astype(np.float32)
        values, vectors = eigsh(curvlinops(case, meter).to_scipy(), k=1, which="LM", tol=RESIDUAL, v0=start)
        return Answer(float(values[0]), vector=torch.from_numpy(vectors[:, 0]))

    return work


def curvlinops_trace(name: str) -> Callable[[Case, Meter], Work]:
    """One of its estimators."""

    def prepare(case: Case, meter: Meter) -> Work:
        import curvlinops as library

        estimator = getattr(library, name)
        return lambda: Answer(float(estimator(curvlinops(case, meter), PRODUCTS)))

    return prepare


# hessian-eigenthings


def eigenthings(case: Case, meter: Meter) -> Any:
    """Its operator with the products counted."""
    from hessian_eigenthings import HessianOperator, supervised_loss

    operator = HessianOperator(case.model, case.data, supervised_loss(CRITERION))
    operator.matvec = meter.counted(operator.matvec)  # type: ignore
    return operator


def alike(case: Case) -> list[str]:
    """A note where batches differ in size, which this tool does not look at."""
    sizes = {len(targets) for _, targets in case.data}
    return [f"counts batches of {' and '.join(map(str, sorted(sizes)))} rows alike"] if len(sizes) > 1 else []


def eigenthings_top(steps: int | None) -> Callable[[Case, Meter], Work]:
    """Lanczos with its default of `2 k` steps, or with so many."""

    def prepare(case: Case, meter: Meter) -> Work:
        from hessian_eigenthings import lanczos

        def work() -> Answer:
            found = lanczos(eigenthings(case, meter), k=1, max_iter=steps, tol=RESIDUAL, seed=0)
            notes = [] if bool(found.converged[0]) else ["says itself that it has not converged"]
            return Answer(float(found.eigenvalues[0]), found.eigenvectors[0], note="; ".join([*notes, *alike(case)]))

        return work

    return prepare


def eigenthings_trace(case: Case, meter: Meter) -> Work:
    """Hutch++, its default."""
    from hessian_eigenthings import trace

    def work() -> Answer:
        found = trace(eigenthings(case, meter), num_matvecs=PRODUCTS, seed=0)
        notes = [f"states a standard error of {found.stderr / abs(found.estimate):.1e} of it", *alike(case)]
        return Answer(found.estimate, note="; ".join(notes))

    return work
