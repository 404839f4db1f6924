"""The number that cannot be moved: find, prove, attack, measure again; and the representative it is taken at."""

import copy
import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

import isoflat
from cases.found import found_of
from cases.transformers import TRANSFORMERS
from cases.zoo import VARIANTS, ZOO, thinned
from isoflat.core.precision import unrounded
from isoflat.geometry.base import Chart, Geometry
from isoflat.geometry.canonical import GEOMETRY
from isoflat.linalg.maps import Diagonal
from isoflat.symmetry.canonical.representative import Epsilon, canonical
from isoflat.symmetry.finding.rules.elementwise import homogeneous
from isoflat.symmetry.groups.basis import BasisChange

ROWS = 24

NAMES = [name for name in ZOO if name != "custom"]
"""Whose operations can be differentiated twice."""

WRONG_PRODUCTS = {"weight-normed"}
"""Whose second derivative torch's own weight normalisation gets wrong by a quarter (against central differences of
gradients); the generator identities refuse it."""

UNMOVED = {"smooth-gelu", "smooth-silu", "smooth-tanh", "lstm"}
"""Nothing but the head's common score moves them: the layer-wise number is next to invariant already."""

_cache: dict[str, tuple] = {}


def _setting(name):
    """The network, its data, and its symmetries under cross-entropy; traced once."""
    if name not in _cache:
        net, inputs = ZOO[name].build(), ZOO[name].inputs(ROWS)
        scores = net(*inputs)
        scores = scores if isinstance(scores, torch.Tensor) else scores[0]
        targets = torch.randint(scores.shape[1], (ROWS, *scores.shape[2:]), generator=torch.Generator().manual_seed(0))
        _cache[name] = net, (inputs[0], targets), found_of(name, net)
    return _cache[name]


TRAINED = {
    "mlp-bias", "lenet-bias", "resnet-basic-batch", "pre-norm-layer", "post-norm-rms", "embedded", "shared-block", "frozen",
    "bilinear", "multihead-fused", "torch-encoder-pre-relu", "decoder-rms", "hugging-gpt2",
}  # fmt: skip
"""Attacked after training, with more controls; at random weights in the slow tests, as all others are after training."""

UNTRAINED = set(NAMES) - TRAINED

LONG = {
    "normless", "hugging-llama", "torch-encoder-stack", "vision", "positioned-untied", "linear-chain-three", "rotary-halves",
    "attention-separate",
}  # fmt: skip
"""Made of what others have one of, and long to measure: attacked in the slow tests."""

ONE_POINT = {
    "mlp-bias", "vgg-batch", "resnet-basic-batch", "densenet-batch", "shuffled", "pre-norm-layer", "post-norm-rms",
    "norm-of-part", "embedded", "tied", "shared-block", "bilinear", "dead-chain", "weight-normed", "lstm",
    "linear-chain-two", "attention-separate", "grouped-queries-flagged", "hugging-gpt2",
}  # fmt: skip
"""Whose representative is seen to be one point: one for each kind of symmetry; all others in the slow tests."""

FRAMED = {
    "mlp-bias", "lenet-bias", "vgg-batch", "transposed-convolution", "resnet-basic-group", "mobilenet-relu6",
    "pre-norm-layer", "post-norm-rms", "two-offsets", "norm-of-part", "embedded", "tied", "shared-block", "shared-affine",
    "frozen", "bilinear", "dead-chain", "linear-chain-two", "attention-separate", "decoder-rms",
}  # fmt: skip
"""Whose frame is compared with that of the moved network: one for each kind of block; all others in the slow tests."""


def _measure(net, data, found, place=GEOMETRY):
    """The canonical number of a network with these symmetries."""
    bound = place.on(replace(found, model=net))
    return isoflat.measure(net, data, nn.CrossEntropyLoss(), geometry=bound, rtol=1e-9)


def _trained(net, data):
    """A copy after thirty steps of Adam, with what is frozen kept."""
    twin = copy.deepcopy(net)
    optimiser = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], 1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        scores = twin(data[0])
        nn.functional.cross_entropy(scores if isinstance(scores, torch.Tensor) else scores[0], data[1]).backward()
        optimiser.step()
    return twin


def _scores(net, data):
    """Outputs up to a common score of each example, which cross-entropy does not see; float64 all the way."""
    with torch.no_grad(), unrounded(torch.float64):
        return torch.log_softmax(net(data[0]), 1)


def _distance(a, b):
    """Largest difference of a tensor, relative to its own norm; of the two nets' largest where it vanishes."""
    pairs = [(p.detach(), q.detach()) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    size = max(float(p.norm()) for p, _ in pairs)
    return max(float((p - q).norm()) / (float(p.norm()) or size) for p, q in pairs)


@pytest.mark.parametrize(
    "name", thinned((name for name in NAMES if name not in WRONG_PRODUCTS), TRAINED | LONG | VARIANTS)
)
def test_attack_does_not_move_it(name):
    """At random weights."""
    net, data, found = _setting(name)
    _attack(name, net, data, found, seed=1, controls=("layerwise",))


@pytest.mark.parametrize("name", thinned((name for name in NAMES if name not in WRONG_PRODUCTS), UNTRAINED))
def test_attack_does_not_move_it_after_training(name):
    """At weights that have been trained for a while."""
    net, data, found = _setting(name)
    _attack(name, _trained(net, data), data, found, seed=2, controls=("layerwise", "euclidean"))


def _attack(name, start, data, found, seed, controls):
    known = replace(found, model=start)
    twin = isoflat.reparametrize(start, known, seed=seed, spread=3)
    change = (_scores(twin, data) - _scores(start, data)).abs().max() / _scores(start, data).abs().max()
    assert float(change) <= 1e-10
    assert _measure(twin, data, found).value == pytest.approx(_measure(start, data, found).value, rel=1e-8)
    # Negative controls: what is not taken at the representative moves; by a lot where whole matrices are at liberty.
    for geometry in controls:
        plain, moved = (
            isoflat.measure(n, data, nn.CrossEntropyLoss(), geometry=geometry, rtol=1e-3) for n in (start, twin)
        )
        if name not in UNMOVED and found.scaling.dimension:
            factor = 10 if name in TRANSFORMERS and found.basis.dimension else 1.2
            assert max(plain.lower, moved.lower) > factor * min(plain.upper, moved.upper)


@pytest.mark.parametrize("name", thinned(NAMES, set(NAMES) - ONE_POINT))
def test_representative_is_one_point_of_the_orbit(name):
    """The same function; reached from anywhere on the orbit; left alone by a second pass.

    Points of least norm differ by rotations: of pairs of linear maps, where the singular vectors choose one, and of
    streams and rotary pairs, which the attack leaves out here.
    """
    net, data, found = _setting(name)
    still = tuple(family for family in found.basis.families if not family.orthogonal)
    found = replace(found, basis=BasisChange(still))
    canon = isoflat.canonicalize(net, found, gauge="principal")
    change = (_scores(canon, data) - _scores(net, data)).abs().max() / _scores(net, data).abs().max()
    assert float(change) <= 1e-10
    again = isoflat.canonicalize(isoflat.reparametrize(net, found, seed=1, spread=3), found, gauge="principal")
    assert _distance(canon, again) <= 1e-10
    for gauge in ("principal", "nearest"):
        assert _distance(canon, isoflat.canonicalize(canon, found, gauge=gauge)) <= 1e-12


@dataclass(frozen=True, eq=False)
class Blocks(Geometry):
    """`D H D` where a network stands, written down once more: entries in units of the norms of blocks of its tensors."""

    units: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def of(net: nn.Module, blocks, without) -> "Blocks":
        """Blocks are those of `Found.blocks`, else whole tensors; single entries may have none."""
        squares: dict[object, float] = {}
        owners = {}
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            axis, numbers = blocks.get(name, (0, [name] * (len(tensor) if tensor.ndim else 1)))
            parts = tensor.detach().movedim(axis, 0).unbind() if tensor.ndim else [tensor.detach()]
            owners[name] = axis, [int(n) if isinstance(n, torch.Tensor) else n for n in numbers]
            for part, owner in zip(parts, owners[name][1], strict=True):
                squares[owner] = squares.get(owner, 0.0) + float(part.double().square().sum())
        units = {}
        for name, tensor in net.named_parameters():
            axis, numbers = owners[name]
            sizes = torch.tensor([squares[owner] ** 0.5 for owner in numbers], dtype=torch.float64)
            wide = sizes.view(-1, *[1] * (tensor.ndim - 1 - axis)) if tensor.ndim else sizes[0]
            units[name] = wide.expand(tensor.shape).clone()
            for mask in without.get(name, ()):
                units[name][mask] = 0.0
        return Blocks("blocks", "norms of blocks", "none", 1, units)

    def chart(self, state):
        frame = Diagonal(torch.cat([self.units[name].reshape(-1) for name in state.parameters]))
        return Chart(state, frame, (), self.group, "")

    def connection(self, state, gradient):
        return None


@pytest.mark.parametrize("name", thinned((name for name in NAMES if name not in WRONG_PRODUCTS), set(NAMES) - FRAMED))
def test_frame_and_moved_model_agree(name):
    """`S⁻ᵀ H S⁻¹` at the user's weights is H at the representative: D H D there, with another Hessian altogether.

    Where one epsilon serves several factors, no network stands at the point that is measured, but one at the exact one.
    """
    net, data, found = _setting(name)
    point = canonical(found, found.state(), Epsilon.MOVED)
    canon = isoflat.canonicalize(net, found)
    masks = [(name, mask) for part in (point.folded, point.removed) for name, mask in part.items()]
    without = {name: [mask for owner, mask in masks if owner == name] for name, _ in masks}
    moved = isoflat.measure(
        canon, data, nn.CrossEntropyLoss(), geometry=Blocks.of(canon, found.blocks, without), rtol=1e-9
    )
    framed = _measure(net, data, found, place=replace(GEOMETRY, epsilon=Epsilon.MOVED))
    assert framed.value == pytest.approx(moved.value, rel=1e-8)


def test_geometry_by_name_finds_proves_and_agrees():
    """The user's path, from a model and data: `geometry="auto"` is the default, in both precisions."""
    net, data, found = _setting("resnet-basic-batch")
    est = isoflat.measure(net, data, nn.CrossEntropyLoss(), rtol=1e-6)
    assert est.converged
    assert est.value == pytest.approx(_measure(net, data, found).value, rel=1e-6)
    assert any("generator identities hold" in note for note in est.notes)


def test_fifty_layers():
    """Balance propagates through a deep chain: one point, from far away, to rounding."""
    net = _dense(4, *[6] * 50, 3)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                nn.init.kaiming_normal_(parameter)
    found = isoflat.symmetries(net, _data(4)[0])
    assert found.scaling.dimension == 300
    canon = isoflat.canonicalize(net, found)
    assert _distance(canon, isoflat.canonicalize(isoflat.reparametrize(net, found, seed=1), found)) <= 1e-10
    assert _distance(canon, isoflat.canonicalize(canon, found)) <= 1e-12


def test_losses_of_more_than_the_output_are_caught():
    """Weight decay inside the loss is no function of the outputs: the generator identities fail, and say so."""
    net, data, _ = _setting("mlp-bias")

    def decayed(model, batch, strength):
        size = sum(p.square().sum() for p in model.parameters())
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + strength * size

    fine, broken = (isoflat.BatchLoss(lambda model, batch, s=s: decayed(model, batch, s)) for s in (0.0, 0.1))
    assert isoflat.measure(net, [data], fine).converged
    with pytest.raises(isoflat.SymmetryViolated, match="generator"):
        isoflat.measure(net, [data], broken)


# What a user adds -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("isoflat_test::ramp", mutates_args=())
def ramp(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0)


@ramp.register_fake
def _(x):
    return torch.empty_like(x)


ramp.register_autograd(
    lambda ctx, grad: grad * ctx.mask, setup_context=lambda ctx, inputs, output: setattr(ctx, "mask", inputs[0] > 0)
)


class Ramp(nn.Module):
    def forward(self, x):
        return ramp(x)


def test_rules_and_declarations_of_the_users_own():
    """An unknown operation fixes its units; a rule, or a declared symmetry, frees them, and both are proved."""
    net, data = _dense(4, 6, 3, act=Ramp), _data(4)
    known = _dense(4, 6, 3)
    unknown = isoflat.symmetries(net, data[0])
    assert unknown.scaling.dimension == 0
    assert any("ramp" in reason for line in unknown.report for reason in line.reasons)
    rule = {"isoflat_test.ramp.default": homogeneous}
    with_rule = isoflat.symmetries(net, data[0], loss=nn.CrossEntropyLoss(), further_rules=rule)
    own = isoflat.UnitScale(("0.weight", "0.bias"), ("2.weight",), 6)
    declared = isoflat.symmetries(net, data[0], declared=[own])
    assert with_rule.scaling.dimension == declared.scaling.dimension == 6
    wanted = _auto(known, data).value
    assert _auto(net, data, symmetries=[own]).value == pytest.approx(wanted, rel=1e-8)
    assert _auto(net, data).value != pytest.approx(wanted, rel=1e-3)
    assert _auto(net, data, symmetries=with_rule).value == pytest.approx(wanted, rel=1e-8)
    with pytest.raises(isoflat.UsageError, match="another network"):
        _auto(known, data, symmetries=with_rule)
    wrong = isoflat.UnitScale(("0.weight",), ("2.weight",), 6)
    with pytest.raises(isoflat.SymmetryViolated):
        isoflat.symmetries(net, data[0], declared=[wrong])
    with pytest.raises(isoflat.SymmetryViolated):
        isoflat.symmetries(_dense(4, 6, 3, act=nn.GELU), data[0], further_rules={"aten.gelu.default": homogeneous})
    with pytest.raises(isoflat.UsageError, match=r"6 units on axis 1 of '0.weight'"):
        isoflat.symmetries(net, data[0], declared=[isoflat.UnitScale((), ("0.weight",), 6)])


# Orbits that are not closed ------------------------------------------------------------------------------------------


def _dense(*widths, act=nn.ReLU):
    layers = []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b, dtype=torch.float64), act()]
    return nn.Sequential(*layers[:-1])


def _data(width, classes=3):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(classes, (ROWS,), generator=generator)


def _auto(net, data, **options):
    return isoflat.measure(net, data, nn.CrossEntropyLoss(), rtol=1e-9, **options)


def _without(net, first, second, units):
    """A network of two linear layers with some hidden units taken out."""
    keep = [u for u in range(net[first].out_features) if u not in units]
    small = copy.deepcopy(net)
    small[first] = nn.Linear(net[first].in_features, len(keep), dtype=torch.float64)
    small[second] = nn.Linear(len(keep), net[second].out_features, dtype=torch.float64)
    with torch.no_grad():
        small[first].weight.copy_(net[first].weight[keep])
        small[first].bias.copy_(net[first].bias[keep])
        small[second].weight.copy_(net[second].weight[:, keep])
        small[second].bias.copy_(net[second].bias)
    return small


@pytest.mark.parametrize("size", [1.0, 1e6])
@pytest.mark.parametrize("side", ["nothing reads it", "nothing feeds it"])
def test_a_dead_unit_counts_as_none(size, side):
    """However large its other weights: the closed orbit has zeros there, and the number is the smaller network's."""
    net, data = _dense(4, 5, 4, 3), _data(4)
    with torch.no_grad():
        if side == "nothing reads it":
            net[2].weight[:, 0] = 0
            net[0].weight[0] *= size
        else:
            net[0].weight[0] = 0
            net[0].bias[0] = 0
            net[2].weight[:, 0] *= size
    est = _auto(net, data)
    assert est.value == pytest.approx(_auto(_without(net, 0, 2, {0}), data).value, rel=1e-8)
    assert any("dead units" in note for note in est.notes)
    canon = isoflat.canonicalize(net, isoflat.symmetries(net, data[0]))
    assert torch.allclose(canon(data[0]), net(data[0]), rtol=1e-12)
    assert not canon[0].weight[0].any()
    assert not canon[2].weight[:, 0].any()


def test_a_chain_of_dead_units_falls_from_its_end():
    """A unit that only dead units read is dead: one zero column far down clears the whole chain."""
    net, data = _dense(4, 5, 5, 4, 3), _data(4)
    with torch.no_grad():
        net[4].weight[:, 1] = 0  # nothing reads unit 1 of the second hidden layer
        net[2].weight[[i for i in range(5) if i != 1], 0] = 0  # which alone reads unit 0 of the first
        net[0].weight[0] *= 1e5
    small = _without(_without(net, 2, 4, {1}), 0, 2, {0})
    assert _auto(net, data).value == pytest.approx(_auto(small, data).value, rel=1e-8)


class Branch(nn.Module):
    """`x + W₂ relu(W₁ x)` on a stream between two linear maps."""

    def __init__(self, zero):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.embed, self.up, self.down, self.head = (
                nn.Linear(a, b, dtype=torch.float64) for a, b in ((4, 5), (5, 6), (6, 5), (5, 3))
            )
        if zero:
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)

    def forward(self, x):
        x = self.embed(x).relu()
        return self.head(x + self.down(self.up(x).relu()))


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_a_zero_branch_counts_as_none(size):
    """Zero-initialised residual branches: whatever feeds the zero is at liberty, and vanishes in the closed orbit."""
    net, data = Branch(zero=True).eval(), _data(4)
    with torch.no_grad():
        net.up.weight *= size
    bare = nn.Sequential(net.embed, nn.ReLU(), net.head)
    assert _auto(net, data).value == pytest.approx(_auto(bare, data).value, rel=1e-8)


def test_zero_gain_and_offset_of_a_batch_normalisation():
    """The usual zero initialisation of a residual branch that ends in batch normalisation."""
    net, inputs = ZOO["resnet-basic-batch"].build(), ZOO["resnet-basic-batch"].inputs(ROWS)[0]
    targets = torch.randint(net(inputs).shape[1], (ROWS,), generator=torch.Generator().manual_seed(0))
    last = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)][2]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    found = isoflat.symmetries(net, inputs, loss=nn.CrossEntropyLoss())
    before = _auto(net, (inputs, targets), symmetries=found)
    twin = isoflat.reparametrize(net, found, seed=1)
    assert _auto(twin, (inputs, targets), symmetries=replace(found, model=twin)).value == pytest.approx(
        before.value, rel=1e-8
    )


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_normalisation_that_nothing_feeds_is_listed(norm):
    """Its scale has no minimum to balance at; it is left out, by name, and the rest keeps its number."""
    net = nn.Sequential(
        _dense(4, 5), norm(5, eps=0.1, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)
    ).eval()
    with torch.no_grad():
        net[0][0].weight.zero_()
        net[0][0].bias.zero_()
    est = _auto(net, _data(4))
    assert any("nothing feeds" in note for note in est.notes)


def test_zero_gains_stay_where_they_are():
    """A gain of exactly zero cannot go into its readers: its columns vanish instead, whatever they were."""
    net = nn.Sequential(
        nn.Linear(4, 6, dtype=torch.float64), nn.LayerNorm(6, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64)
    ).eval()
    data = _data(4)
    with torch.no_grad():
        net[1].weight[2] = 0
    before = _auto(net, data).value
    with torch.no_grad():
        net[2].weight[:, 2] *= 1e4
        net[2].bias -= net[1].bias[2] * net[2].weight[:, 2] * (1 - 1e-4)
    assert _auto(net, data).value == pytest.approx(before, rel=1e-8)
