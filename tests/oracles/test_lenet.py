"""A LeNet against ARPACK on products of another making, and against the paper's own power method."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import nn

import isoflat
from isoflat.core.rng import stream
from isoflat.curvature.matrix import Curvature
from isoflat.experiments.families import lenet
from isoflat.geometry.layerwise import GEOMETRY
from isoflat.linalg.eigen.power import PowerMethod
from isoflat.linalg.operator import Pullback
from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.linearise import linearise
from isoflat.risk.losses import as_loss
from isoflat.risk.network import Network, exactly
from isoflat.risk.plan import plan
from isoflat.risk.routes.reverse import Recomputed

CRITERION = nn.CrossEntropyLoss()


def _trained(inputs, targets, epochs: int):
    """A LeNet trained with Adam on batches of 64; float32, from seed 0."""
    net = lenet.build(seed=0)
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=order).split(64):
            optimiser.zero_grad()
            CRITERION(net(inputs[rows]), targets[rows]).backward()
            optimiser.step()
    return net.eval()


def _power_method(net, inputs, targets):
    """The paper's number by its own method and stopping rule in float64, and its cost in gradient passes."""
    network = Network(net)
    state = network.state().to(dtype=torch.float64)
    risk = EmpiricalRisk(network, as_loss(CRITERION), as_batches((inputs, targets)))
    with exactly(state.device):
        survey = risk.survey(state)
        started = time.monotonic()
        hessian = Curvature(linearise(risk, state, plan(risk, state, Recomputed, len(inputs), memory=4 << 30)))
        frame = GEOMETRY.frame(state)
        power = PowerMethod(frame=frame)(Pullback(hessian, frame), stream(0, "power"))
        return power, (time.monotonic() - started) / survey.seconds


def test_lenet_on_enlarged_digits_against_arpack():
    """The oracle's products are forward over reverse through torch.func, in float64; its solver is ARPACK."""
    pixels, classes = load_digits(return_X_y=True)
    small = torch.from_numpy(np.asarray(pixels)[:48].astype(np.float32) / 16).view(-1, 1, 8, 8)
    inputs = nn.functional.interpolate(small, size=(28, 28))
    targets = torch.from_numpy(np.asarray(classes)[:48].astype(np.int64))
    net = _trained(inputs, targets, epochs=8)
    estimate = isoflat.measure(net, (inputs, targets), CRITERION, measure="hessian_spectral_norm", rtol=1e-4)

    names, tensors = zip(*((name, p.detach().double()) for name, p in net.named_parameters()), strict=True)
    sizes = [t.numel() for t in tensors]

    def loss(*parts):
        output = torch.func.functional_call(net, dict(zip(names, parts, strict=True)), (inputs.double(),))
        return CRITERION(output, targets)

    gradient = torch.func.grad(loss, argnums=tuple(range(len(tensors))))

    def product(vector):
        flat = torch.from_numpy(np.asarray(vector, dtype=np.float64).reshape(-1))
        tangents = tuple(v.view_as(t) for v, t in zip(flat.split(sizes), tensors, strict=True))
        moved = torch.func.jvp(gradient, tensors, tangents)[1]
        return torch.cat([part.reshape(-1) for part in moved]).detach().numpy()

    operator = LinearOperator((sum(sizes), sum(sizes)), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(sum(sizes))
    oracle = float(eigsh(operator, k=1, which="LM", tol=1e-7, v0=start, return_eigenvectors=False)[0])
    assert estimate.value == pytest.approx(abs(oracle), rel=1e-5)
    assert estimate.converged


@pytest.mark.slow
def test_lenet_on_mnist_against_curvlinops_and_the_papers_method():
    """Real MNIST: the plain norm to 1e-5 of curvlinops with eigsh, the quotient's to 1e-8 of the power method."""
    folder = os.environ.get("ISOFLAT_DATA")
    if not folder or not (Path(folder) / "mnist.npz").exists():
        pytest.skip("set ISOFLAT_DATA to a folder that holds mnist.npz")
    with np.load(Path(folder) / "mnist.npz", allow_pickle=False) as archive:
        inputs = torch.from_numpy(archive["x_train"][:2000].astype(np.float32) / 255)[:, None]
        targets = torch.from_numpy(archive["y_train"][:2000].astype(np.int64))
    net = _trained(inputs, targets, epochs=6)
    table = isoflat.measure_all(
        net,
        (inputs, targets),
        CRITERION,
        measures=["quotient_spectral_norm", "hessian_spectral_norm"],
        geometry="layerwise",
        rtol=1e-5,
    )
    for row in table:
        cost = row.estimate.cost
        print(f"\n{row.measure}: {row.estimate}, {cost.products} products, {cost.gradient_passes:.1f} gradient passes")
    power, passes = _power_method(net, inputs, targets)
    print(
        f"power method: {power.wanted.value:.12g}, {power.products} products, {passes:.1f} gradient passes in float64"
    )
    precise = isoflat.measure(net, (inputs, targets), CRITERION, geometry="layerwise", rtol=1e-9, dtype="float64")
    assert precise.value == pytest.approx(power.wanted.value, rel=1e-8)
    assert table[0].estimate.value == pytest.approx(power.wanted.value, rel=1e-8)

    curvlinops = pytest.importorskip("curvlinops", reason="run by `make test-oracles`")
    theirs = curvlinops.HessianLinearOperator(
        net, CRITERION, [p for p in net.parameters() if p.requires_grad], [(inputs, targets)]
    )
    top = float(eigsh(theirs.to_scipy(), k=1, which="LM", tol=1e-6, return_eigenvectors=False)[0])
    print(f"curvlinops with eigsh: {top:.8g}")
    assert table[1].estimate.value == pytest.approx(abs(top), rel=1e-5)
