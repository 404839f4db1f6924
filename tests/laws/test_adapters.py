"""Adapters of low rank beside the layers of whole networks: with everything trained, over a frozen base, and untrained."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import isoflat
from cases.zoo import ZOO

ROWS = 12

BESIDE = {
    # Which layers get one: ends of their names.
    "hugging-gpt2": ("c_attn", "c_fc"),
    "hugging-llama": ("q_proj", "v_proj"),
    "hugging-bert": ("query", "value"),
    "hugging-vit": ("q_proj", "v_proj", "query", "value"),
    "torch-encoder-pre-gelu": ("linear1", "linear2"),
    "torch-encoder-post-relu": ("linear1", "linear2"),
    "multihead-fused": ("0",),
    "normless": ("query", "value"),
}


class Beside(nn.Module):
    """An adapter beside a layer of any kind that is linear, also one that holds its inputs first."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(inputs, 2, False), nn.Linear(2, outputs, False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * 1.5


def adapted(name: str, zero: bool, frozen: bool) -> nn.Module:
    """The zoo's network with adapters beside some of its layers."""
    net = ZOO[name].build()
    torch.manual_seed(1)
    for parameter in net.parameters():
        parameter.requires_grad_(not frozen)
    for path, layer in list(net.named_modules()):
        if path.split(".")[-1] in BESIDE[name] and hasattr(layer, "weight") and layer.weight.ndim == 2:
            inputs, outputs = layer.weight.T.shape if isinstance(layer, nn.Linear) else layer.weight.shape
            holder, _, own = path.rpartition(".")
            made = Beside(layer, inputs, outputs).double()
            if zero:
                nn.init.zeros_(made.up.weight)
            setattr(net.get_submodule(holder), own, made)
    assert any(isinstance(module, Beside) for module in net.modules())
    return net.eval()


def _data(name):
    inputs = ZOO[name].inputs(ROWS, seed=2)
    with torch.no_grad():
        scores = ZOO[name].build()(*inputs)
    return inputs[0], torch.randint(
        scores.shape[1], (ROWS, *scores.shape[2:]), generator=torch.Generator().manual_seed(0)
    )


def _measure(net, data, found):
    """The canonical number of a network with these symmetries, which are proved on it; finding them takes longest."""
    known = replace(found, model=net)
    return isoflat.measure(net, data, nn.CrossEntropyLoss(), symmetries=known, rtol=1e-9)


def _some(*quick):
    """All of them; but for a few they are slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in sorted(BESIDE)]


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        pytest.param(*param.values, frozen, id=f"{param.values[0]}-{word}", marks=param.marks)
        for word, frozen, other in (
            ("trained", False, "torch-encoder-post-relu"),
            ("frozen", True, "torch-encoder-pre-gelu"),
        )
        for param in _some("multihead-fused", other)
    ],
)
def test_attack_does_not_move_it(name, frozen):
    """Adapters that add something, over a base that is trained or frozen."""
    net, data = adapted(name, zero=False, frozen=frozen), _data(name)
    found = isoflat.symmetries(net, data[0], loss=nn.CrossEntropyLoss())
    pairs = [f for f in found.basis.families if not f.orthogonal and any(n.endswith(".down.weight") for n in f.names)]
    assert len(pairs) >= sum(isinstance(module, Beside) for module in net.modules())
    twin = isoflat.reparametrize(net, found, seed=1, spread=2)
    before, after = (_measure(n, data, found) for n in (net, twin))
    assert before.value == pytest.approx(after.value, rel=1e-8)


@pytest.mark.parametrize("name", _some("multihead-fused"))
def test_attack_does_not_move_it_before_training(name):
    """`up = 0`: `down` is at liberty, and the closed orbit has zeros there."""
    net, data = adapted(name, zero=True, frozen=False), _data(name)
    found = isoflat.symmetries(net, data[0], loss=nn.CrossEntropyLoss())
    twin = isoflat.reparametrize(net, found, seed=1, spread=2)
    for module in twin.modules():
        if isinstance(module, Beside):
            module.down.weight.data.normal_()  # what reads nothing may be anything
    before, after = (_measure(n, data, found) for n in (net, twin))
    assert before.value == pytest.approx(after.value, rel=1e-8)
