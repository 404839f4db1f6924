"""What other tools put around a network is looked through, and said."""

import pytest
import torch
from torch import nn

import isoflat
from cases.networks import mlp


def _fabric(net: nn.Module) -> nn.Module:
    """As Lightning Fabric sets a model up."""

    class _FabricModule(nn.Module):
        def __init__(self, forward_module: nn.Module, original_module: nn.Module) -> None:
            super().__init__()
            self._forward_module, self._original_module = forward_module, original_module

        @property
        def module(self) -> nn.Module:
            return self._original_module

        def forward(self, *args):
            raise AssertionError("the wrapper must not be called")

    return _FabricModule(nn.DataParallel(net), net)


def test_wrappers_are_removed_and_named():
    case = mlp((3, 5, 4), bias=True, seed=1)
    plain = isoflat.measure(case.net, case.data, case.criterion, geometry="layerwise")
    compiled = torch.compile(case.net)
    for wrapped, what in (
        (_fabric(case.net), "Lightning Fabric"),
        (nn.DataParallel(case.net), "DataParallel"),
        (compiled, "torch.compile"),
        (_fabric(compiled), "Lightning Fabric, torch.compile"),
    ):
        found = isoflat.measure(wrapped, case.data, case.criterion, geometry="layerwise", params="*weight")
        assert f"measured without its wrapper: {what}" in found.notes
        assert "held fixed: 0.bias, 2.bias" in found.notes  # names are those of the network inside
        assert isoflat.measure(wrapped, case.data, case.criterion, geometry="layerwise").value == plain.value
    assert not any("wrapper" in note for note in plain.notes)


@pytest.mark.parametrize("geometry", ["layerwise", "auto"])
def test_parts_that_are_compiled_run_as_written(geometry):
    case, whole, part = (mlp((3, 5, 4), bias=True, seed=1) for _ in range(3))
    plain = isoflat.measure(case.net, case.data, case.criterion, geometry=geometry)
    whole.net.compile()
    part.net[0] = torch.compile(part.net[0])
    for net in (whole.net, part.net):
        found = isoflat.measure(net, case.data, case.criterion, geometry=geometry)
        assert found.value == plain.value
        assert "compiled parts were run as they are written" in found.notes


def test_a_networks_own_attribute_named_module_is_no_wrapper():
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

        def forward(self, x):
            return 2 * self.module(x)

    case = mlp((3, 5, 4), bias=True, seed=1)
    plain, outer = (isoflat.measure(net, case.data, case.criterion).value for net in (case.net, Outer(case.net)))
    assert plain != outer
