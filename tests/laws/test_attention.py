"""Attention: what packs, what may be mixed, what single entries mean, and edits by hand that keep the function."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import isoflat
from cases.found import found_of
from cases.transformers import SEQUENCE, Adapted, Attention, reader, unpacked
from cases.zoo import TOKENS, ZOO, Joined, randomised
from isoflat.core.errors import SymmetryViolated
from isoflat.core.precision import unrounded
from isoflat.geometry.elementwise import GEOMETRY as ELEMENTWISE
from isoflat.geometry.traced import Traced
from isoflat.symmetry.canonical.balance import cut
from isoflat.symmetry.canonical.representative import Gauge
from isoflat.symmetry.finding import discover
from isoflat.symmetry.finding.bases.rules import RULES
from isoflat.symmetry.finding.rules.elementwise import homogeneous
from isoflat.symmetry.groups.basis import BasisChange

DOUBLE = torch.float64
LOSS = nn.CrossEntropyLoss()
ROWS = 12

hugging = pytest.mark.skipif("hugging-llama" not in ZOO, reason="needs transformers")


def _data(name: str | None = None, shape=SEQUENCE):
    generator = torch.Generator().manual_seed(0)
    if name is not None:
        inputs = ZOO[name].inputs(ROWS)[0]
        scores = ZOO[name].build()(inputs)
    else:
        inputs = torch.randn(ROWS, *shape, generator=generator, dtype=DOUBLE)
        scores = torch.zeros(ROWS, 3, *shape[:-1])
    return inputs, torch.randint(scores.shape[1], (ROWS, *scores.shape[2:]), generator=generator)


def _random(net: nn.Module, seed: int = 0) -> nn.Module:
    return randomised(net.double().eval(), torch.Generator().manual_seed(seed))


def _found(net, data, rules=None):
    return isoflat.symmetries(net, data[0], loss=LOSS, further_rules=rules, verify=False)


def _number(net, data, geometry="auto", rtol=1e-10, found=None) -> float:
    """With symmetries of a network of the same architecture, where they are known: finding them takes longest."""
    known = replace(found, model=net) if found is not None else None
    return isoflat.measure(net, data, LOSS, geometry=geometry, rtol=rtol, symmetries=known).value


def _outputs(net, data):
    with torch.no_grad(), unrounded(DOUBLE):
        return torch.log_softmax(net(data[0]), 1)


def _same_function(a, b, data, tolerance=1e-10):
    before, after = _outputs(a, data), _outputs(b, data)
    return float((before - after).abs().max()) <= tolerance * float(before.abs().max())


# Packed ---------------------------------------------------------------------------------------------------------------

PACKED = ["attention-chunked", "glu-packed"]
PACKED_TOO = ["attention-by-head", "attention-unbound", "glu-bilinear-packed"]


@pytest.mark.parametrize("name", [*PACKED, *(pytest.param(name, marks=pytest.mark.slow) for name in PACKED_TOO)])
def test_packed_counts_as_unpacked(name):
    """Query, key and value, gate and value: three layers or one, as trained and far out on the orbit."""
    net, data = ZOO[name].build(), _data(name)
    found, other = found_of(name, net), _found(unpacked(net), data)
    wanted = _number(net, data, found=found)
    assert _number(unpacked(net), data, found=other) == pytest.approx(wanted, rel=1e-10)
    moved = isoflat.reparametrize(net, found, seed=3)
    apart = unpacked(moved)
    assert _same_function(net, apart, data)
    assert _number(moved, data, found=found) == pytest.approx(wanted, rel=1e-8)
    assert _number(apart, data, found=other) == pytest.approx(wanted, rel=1e-8)
    # Negative control: to the layer-wise number it makes a difference how weights are stored.
    assert _number(unpacked(net), data, "layerwise", 1e-6) != pytest.approx(
        _number(net, data, "layerwise", 1e-6), rel=1e-3
    )


def test_two_linear_maps_side_by_side_are_one():
    """What a change of basis mixes is one block, in however many tensors it lies."""
    two = _random(
        nn.Sequential(
            nn.Linear(3, 5),
            nn.ReLU(),
            Joined(nn.Linear(5, 2), nn.Linear(5, 3)),
            nn.Linear(5, 4),
            nn.ReLU(),
            nn.Linear(4, 3),
        )
    )
    one = copy.deepcopy(two)
    one[2] = nn.Linear(5, 5, dtype=DOUBLE)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(one[2], name).copy_(torch.cat([getattr(part, name) for part in two[2].branches]))
    data = _data(shape=(3,))
    wanted = _number(one, data)
    assert _number(two, data) == pytest.approx(wanted, rel=1e-10)
    found = _found(two, data)
    moved = isoflat.reparametrize(two, found, seed=3)
    assert _number(moved, data, found=found) == pytest.approx(wanted, rel=1e-8)


# Single entries -------------------------------------------------------------------------------------------------------


SINGLE = [
    "attention-separate",
    pytest.param("grouped-queries-flagged", marks=pytest.mark.slow),
    "rotary-halves",
    "torch-encoder-pre-gelu",
    "linear-chain-two",
]


@pytest.mark.parametrize("name", SINGLE)
def test_elementwise_is_proof_against_all_but_rotations(name):
    """Scalings, shifts, common vectors, and whatever may pass between two linear maps."""
    net, data = ZOO[name].build(), _data(name)
    found = found_of(name, net)
    pairs = replace(found, basis=BasisChange(tuple(f for f in found.basis.families if not f.orthogonal)))
    assert pairs.basis.dimension
    place = ELEMENTWISE.on(found)
    wanted = _number(net, data, place, 1e-9)
    twin = isoflat.reparametrize(net, pairs, seed=1)
    assert _number(twin, data, ELEMENTWISE.on(replace(found, model=twin)), 1e-9) == pytest.approx(wanted, rel=1e-8)
    loose = {name for family in found.basis.families if family.orthogonal for name in family.names}
    notes = [note for note in place.chart(found.state()).notes if "claim withdrawn" in note]
    assert len(notes) == bool(loose)
    assert all(name in notes[0] for name in loose)


@dataclass(frozen=True)
class Nearest(Traced):
    """Entry by entry, at whatever point of least norm is nearest: what `elementwise` would be without singular vectors."""

    @property
    def gauge(self):
        return Gauge.NEAREST

    def units(self, found, point, state):
        return {name: point.state.tensors[name].abs() for name in state.parameters}, ()

    def open(self, found, point, state):
        return ()


def _between(bias: bool = False) -> nn.Module:
    """Attention whose inputs and outputs nothing scales."""
    return _random(reader(nn.Tanh(), Attention(4, bias=bias), nn.Tanh()))


def test_a_rotation_in_a_head_moves_single_entries_unless_singular_vectors_fix_them():
    net, data = _between(), _data()
    twin = copy.deepcopy(net)
    angle = torch.tensor(0.7, dtype=DOUBLE)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    with torch.no_grad():
        twin[2].value.weight[:2] = turn @ twin[2].value.weight[:2]
        twin[2].output.weight[:, :2] = twin[2].output.weight[:, :2] @ turn.T
    assert _same_function(net, twin, data)
    nearest, found = Nearest("nearest", "entry by entry", "none"), _found(net, data)
    plain, moved = (_number(n, data, nearest.on(replace(found, model=n)), 1e-9) for n in (net, twin))
    assert moved != pytest.approx(plain, rel=1e-4)
    fixed, still = (_number(n, data, ELEMENTWISE.on(replace(found, model=n)), 1e-9) for n in (net, twin))
    assert still == pytest.approx(fixed, rel=1e-8)


def test_singular_values_that_tie_withdraw_the_claim():
    """Orthogonal values and outputs of one size: nothing tells the coordinates of a head apart."""
    net, data = _between(), _data()
    found = _found(net, data)
    assert not any("claim withdrawn" in note for note in ELEMENTWISE.on(found).chart(found.state()).notes)
    with torch.no_grad():
        for head in (slice(0, 2), slice(2, 4)):
            net[2].value.weight[head] = 3 * torch.linalg.qr(net[2].value.weight[head].T).Q.T
            net[2].output.weight[:, head] = 0.5 * torch.linalg.qr(net[2].output.weight[:, head]).Q
    (note,) = (note for note in ELEMENTWISE.on(found).chart(found.state()).notes if "claim withdrawn" in note)
    assert "2.value.weight" in note
    assert "2.output.weight" in note
    assert "2.query.weight" not in note


# Adapters -------------------------------------------------------------------------------------------------------------


def _adapted(kind: str) -> nn.Module:
    return ZOO[f"adapters-{kind}"].build()


def test_an_adapter_that_adds_nothing_counts_as_none():
    """As initialised, its first factor is at liberty: the closed orbit has zeros there."""
    bare, data = _random(reader(nn.ReLU(), Attention(4), nn.ReLU())), _data()
    net = copy.deepcopy(bare)
    for name in ("query", "value"):
        setattr(net[2], name, Adapted(getattr(net[2], name)).double())
        nn.init.zeros_(getattr(net[2], name).up.weight)
    est = isoflat.measure(net, data, LOSS, rtol=1e-10)
    assert est.value == pytest.approx(_number(bare, data), rel=1e-8)
    assert any("dead units" in note and "query.down.weight" in note for note in est.notes)
    (note,) = (note for note in est.notes if "invisible" in note)
    assert "2.query.down.weight, 2.value.down.weight (zero on the closed orbit)" in note
    found = _found(net, data)
    twin = isoflat.reparametrize(net, found, seed=1)
    assert _number(twin, data, found=found) == pytest.approx(est.value, rel=1e-8)


def test_a_frozen_base_is_acted_on_nevertheless():
    """Only adapters are trained: what may be mixed with tensors that are held is mixed."""
    net, data = _adapted("random"), _data("adapters-random")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".up." in name or ".down." in name)
    found = _found(net, data)
    wanted = _number(net, data, found=found)
    twin = isoflat.reparametrize(net, found, seed=1)
    assert _number(twin, data, found=found) == pytest.approx(wanted, rel=1e-8)
    plain, moved = (_number(n, data, "layerwise", 1e-3) for n in (net, twin))
    assert max(plain, moved) > 10 * min(plain, moved)


def test_only_adapters_that_add_nothing_have_no_number():
    """All that is trained is at liberty or zero: no block has a unit, and each is listed."""
    net, data = _adapted("zero"), _data("adapters-zero")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".up." in name or ".down." in name)
    est = isoflat.measure(net, data, LOSS)
    assert est.value == 0.0
    (note,) = (note for note in est.notes if "invisible" in note)
    assert all(name in note for name, parameter in net.named_parameters() if parameter.requires_grad)


# Changes that are none ------------------------------------------------------------------------------------------------


def passing(tensor_axes, node, x, *args, **kwargs):
    """Says that an operation does not touch the basis."""
    return x


def uncentred(tensor_axes, node, x, shape, gain=None, offset=None, *args):
    """Says that every rotation passes a LayerNorm."""
    tensor_axes.partition.turn(tensor_axes.partition.line(x, -1))
    return x


def scaling(constraints, node, x, *args):
    """Says that an operation scales as its input does."""
    return homogeneous(constraints, node, x)


WRONG = {
    "relu": ("aten.relu.default", passing, nn.ReLU, {}),
    "gelu": ("aten.gelu.default", passing, nn.GELU, {"aten.gelu.default": scaling}),
    "tanh": ("aten.tanh.default", passing, nn.Tanh, {"aten.tanh.default": scaling}),
    "softmax": ("aten.softmax.int", passing, lambda: nn.Softmax(-1), {"aten.softmax.int": scaling}),
    "layer norm": ("aten.layer_norm.default", uncentred, lambda: nn.LayerNorm(4, elementwise_affine=False), {}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "tanh" else n for n in WRONG])
def test_a_wrong_change_of_basis_is_refused(name, monkeypatch):
    """A rule that lets bases pass where none can: the derivative on the network says no, to that and to nothing else.

    Even where the rules for scales are wrong in the same way; else a matrix whose diagonal does not scale is refused.
    """
    operation, rule, make, scales = WRONG[name]
    net, data = _random(nn.Sequential(nn.Linear(3, 4), make(), nn.Linear(4, 3), nn.Linear(3, 3))), _data(shape=(3,))
    right = set(map(repr, _found(net, data).basis.families))
    monkeypatch.setitem(RULES, operation, rule)
    refused = _found(net, data)
    assert refused.basis.dimension == 6
    assert {*map(repr, refused.basis.families)} <= right
    assert refused.verify(spread=3.0) <= 1e-10
    assert repr(_found(net, data, scales).basis) == repr(refused.basis)
    monkeypatch.setattr(discover, "accepted", lambda basis, *_: basis)
    unasked = _found(net, data, scales)
    assert unasked.basis.dimension > 6
    state = unasked.state()
    moved = unasked.output(unasked.basis.act(state, unasked.basis.sample(torch.Generator().manual_seed(0))))
    assert float((moved - unasked.output(state)).abs().max()) > 1e-3
    with pytest.raises(SymmetryViolated):
        unasked.verify()


# Pairs that are short of rank -----------------------------------------------------------------------------------------


def _short(case: str) -> tuple[nn.Module, nn.Module]:
    """A network with a pair that has more coordinates than its product has rank, and the same without them."""
    full = _random(reader(nn.ReLU(), Attention(4), nn.ReLU()), 4)
    attention = full[2]
    with torch.no_grad():
        if "bias" not in case:
            attention.value.bias.zero_()
        if "dead head" in case:
            attention.output.weight[:, :2] = 0
        if "rank one" in case:
            for head in (slice(0, 2), slice(2, 4)):
                u, s, v = torch.linalg.svd(attention.value.weight[head], full_matrices=False)
                attention.value.weight[head] = s[0] * torch.outer(u[:, 0], v[0])
        short = copy.deepcopy(full)
        small = short[2]
        small.output.bias += small.output.weight @ small.value.bias  # attention weights add up to one
        if "dead head" in case:
            small.value.weight[:2] = 0
            small.value.bias.zero_()
        else:
            values, outputs = [], []
            for head in (slice(0, 2), slice(2, 4)):
                u, s, v = torch.linalg.svd(small.output.weight[:, head] @ small.value.weight[head], full_matrices=False)
                values.append(s[0] * v[:1])
                outputs.append(u[:, :1])
            small.value, small.output = nn.Linear(4, 2, dtype=DOUBLE), nn.Linear(2, 4, dtype=DOUBLE)
            small.value.weight.copy_(torch.cat(values))
            small.value.bias.zero_()
            small.output.weight.copy_(torch.cat(outputs, 1))
            small.output.bias.copy_(full[2].output.bias + full[2].output.weight @ full[2].value.bias)
    return full, short


@pytest.mark.parametrize(
    "case",
    [
        "rank one, bias",
        "dead head",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("rank one", "dead head, bias")),
    ],
)
def test_a_pair_short_of_rank_is_cut_to_it(case):
    """The same function, and the number of the network that never had the coordinates."""
    full, short = _short(case)
    data = _data()
    assert _same_function(full, short, data)
    found = _found(full, data)
    wanted = _number(short, data, found=found if "dead" in case else None)
    assert _number(full, data, found=found) == pytest.approx(wanted, rel=1e-8)
    twin = isoflat.reparametrize(full, found, seed=1)
    assert _number(twin, data, found=found) == pytest.approx(wanted, rel=1e-8)
    canon = isoflat.canonicalize(full, found)
    assert _same_function(full, canon, data)
    head = canon[2].value.weight[:2].detach()
    assert torch.linalg.matrix_rank(head) == (0 if "dead" in case else 1)


def test_cutting_keeps_the_product():
    full, _ = _short("rank one")
    found = _found(full, _data())
    state = found.state()
    after = cut(found.basis.families, state)
    names = ("2.value.weight", "2.output.weight")
    for head in (slice(0, 2), slice(2, 4)):
        before, product = (s.tensors[names[1]][:, head] @ s.tensors[names[0]][head] for s in (state, after))
        assert torch.allclose(before, product, atol=1e-12)
        assert torch.linalg.matrix_rank(after.tensors[names[1]][:, head]) == 1


# Edits by hand --------------------------------------------------------------------------------------------------------


def _invertible(size: int):
    return torch.randn(size, size, dtype=DOUBLE) + 2 * torch.eye(size, dtype=DOUBLE)


def heads(query, key, value, output, *, biases=True):
    """A matrix of its own for the queries and keys of each head of two, and for its values and outputs.

    Each argument is a function of the tensors that gives a view `(heads · size, …)` of what is mixed, bias last.
    """

    def edit(t):
        for place in (slice(0, 2), slice(2, 4)):
            g, m = _invertible(2), _invertible(2)
            for part in query(t):
                part[place] = g @ part[place]
            for part in key(t):
                part[place] = torch.linalg.inv(g).T @ part[place]
            for part in value(t):
                part[place] = m @ part[place]
            for part in output(t):
                part[place] = torch.linalg.inv(m).T @ part[place]

    return edit


def torch_heads(path):
    """Of `nn.MultiheadAttention`, whose projection holds queries, keys and values one below the other."""

    def rows(start):
        return lambda t: [t[f"{path}in_proj_weight"][start : start + 4], t[f"{path}in_proj_bias"][start : start + 4]]

    return heads(rows(0), rows(4), rows(8), lambda t: [t[f"{path}out_proj.weight"].T])


def gpt2_heads(path):
    """Of GPT-2, whose layers hold inputs by outputs."""

    def columns(start):
        return lambda t: [t[f"{path}c_attn.weight"].T[start : start + 4], t[f"{path}c_attn.bias"][start : start + 4]]

    return heads(columns(0), columns(4), columns(8), lambda t: [t[f"{path}c_proj.weight"]])


def permuted_heads(path):
    def edit(t):
        order = torch.tensor([2, 3, 0, 1])
        for name in ("in_proj_weight", "in_proj_bias"):
            part = t[f"{path}{name}"]
            part.copy_(torch.cat([third[order] for third in part.split(4)]))
        t[f"{path}out_proj.weight"].copy_(t[f"{path}out_proj.weight"][:, order])

    return edit


def reads_a_norm(norm, weight, bias):
    """`a (1/γ)ᵀ` on the weight, and off the bias what comes of the offset: `x̂` has no mean."""

    def edit(t):
        gain, offset = t[f"{norm}.weight"], t[f"{norm}.bias"]
        a = 3 * torch.randn(t[weight].shape[0], dtype=DOUBLE)
        t[weight] += torch.outer(a, 1 / gain)
        t[bias] -= a * (offset / gain).sum()

    return edit


def writes_a_stream(*weights, axis=0, bias=None):
    """A common vector for every coordinate of the stream: all that reads it subtracts the mean."""

    def edit(t):
        for weight in weights:
            shape = list(t[weight].shape)
            shape[axis] = 1
            t[weight] += 3 * torch.randn(shape, dtype=DOUBLE)
        if bias is not None:
            t[bias] += 3.0

    return edit


def rotated_stream(table, head, last, *layers):
    """Gains folded into what reads them; then another orthonormal basis for the stream, for writers and readers."""

    def edit(t):
        width = t[table].shape[1]
        turn = torch.linalg.qr(torch.randn(width, width, dtype=DOUBLE)).Q
        reading = [(last, [head]), *((norm, [f"{r}.weight" for r in readers]) for norm, readers, _ in layers)]
        for norm, weights in reading:
            for weight in weights:
                t[weight].copy_(t[weight] * t[f"{norm}.weight"] @ turn.T)
            t[f"{norm}.weight"].fill_(1.0)
        for _, _, writer in layers:
            t[f"{writer}.weight"].copy_(turn @ t[f"{writer}.weight"])
        t[table].copy_(t[table] @ turn.T)

    return edit


def rotary_planes(query, key, groups=2, shared=2, size=4):
    """A rotation and a factor for each pair of coordinates that turns with the position: i and i + size / 2."""

    def edit(t):
        for group in range(groups):
            for pair in range(size // 2):
                angle, factor = torch.randn((), dtype=DOUBLE), 5.0 ** (1 - 2 * pair)
                turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
                for name, count, scale in ((query, shared, factor), (key, 1, 1 / factor)):
                    for head in range(group * count, group * count + count):
                        place = [head * size + pair, head * size + pair + size // 2]
                        t[name][place] = scale * turn @ t[name][place]

    return edit


OWN = "blocks.{}.branches.1"  # of `Language`
LLAMA = "model.model.layers.{}"
EDITS = {
    "heads of torch's attention": ("multihead-fused", torch_heads("2.attention.")),
    "heads of torch's encoder": ("torch-encoder-stack", torch_heads("1.layers.1.self_attn.")),
    "permuted heads": ("multihead-fused", permuted_heads("2.attention.")),
    "rows of what reads a LayerNorm": (
        "torch-encoder-pre-gelu",
        reads_a_norm("1.norm1", "1.self_attn.in_proj_weight", "1.self_attn.in_proj_bias"),
    ),
    "rows of a hidden layer": ("torch-encoder-pre-relu", reads_a_norm("1.norm2", "1.linear1.weight", "1.linear1.bias")),
    "columns of what writes a stream": (
        "torch-encoder-stack",
        writes_a_stream("0.weight", "1.layers.0.self_attn.out_proj.weight", "1.layers.1.linear2.weight", bias="0.bias"),
    ),
    "rows of a table": ("decoder-layer", writes_a_stream("tokens.weight", axis=1)),
    "a stream of RMSNorm turned": (
        "decoder-rms",
        rotated_stream(
            "tokens.weight",
            "head.weight",
            "last",
            (
                f"{OWN}.0".format(0),
                [f"{OWN}.1.{n}".format(0) for n in ("query", "key", "value")],
                f"{OWN}.1.output".format(0),
            ),
            (f"{OWN}.0".format(1), [f"{OWN}.1.{n}".format(1) for n in ("gate", "up")], f"{OWN}.1.down".format(1)),
        ),
    ),
    "rotary planes": ("decoder-rms", rotary_planes(*(f"{OWN}.1.{n}.weight".format(0) for n in ("query", "key")))),
    "heads of GPT-2": ("hugging-gpt2", gpt2_heads("model.transformer.h.1.attn.")),
    "positions of GPT-2": ("hugging-gpt2", writes_a_stream("model.transformer.wpe.weight", axis=1)),
    "a stream of LLaMA turned": (
        "hugging-llama",
        rotated_stream(
            "model.model.embed_tokens.weight",
            "model.lm_head.weight",
            "model.model.norm",
            *(
                (f"{layer}.{norm}", [f"{layer}.{part}.{n}_proj" for n in readers], f"{layer}.{part}.{writer}_proj")
                for layer in map(LLAMA.format, (0, 1))
                for norm, part, readers, writer in (
                    ("input_layernorm", "self_attn", "qkv", "o"),
                    ("post_attention_layernorm", "mlp", ("gate", "up"), "down"),
                )
            ),
        ),
    ),
    "rotary planes of LLaMA": (
        "hugging-llama",
        rotary_planes(*(f"{LLAMA}.self_attn.{n}_proj.weight".format(0) for n in "qk")),
    ),
}


EDITS_TOO = {
    "heads of torch's encoder", "rows of a hidden layer", "positions of GPT-2", "rotary planes of LLaMA"
}  # fmt: skip
"""Made to other layers as well, or to another network."""


@pytest.mark.parametrize("edit", [pytest.param(e, marks=pytest.mark.slow) if e in EDITS_TOO else e for e in EDITS])
def test_an_edit_by_hand_does_not_move_the_number(edit):
    name, change = EDITS[edit]
    if name not in ZOO:
        pytest.skip("needs transformers")
    net, data = ZOO[name].build(), _data(name)
    twin = copy.deepcopy(net)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        change({key: tensor.data for key, tensor in twin.named_parameters()})
    assert _same_function(net, twin, data)
    before, after = (_number(n, data, rtol=1e-9, found=found_of(name, net)) for n in (net, twin))
    assert after == pytest.approx(before, rel=1e-8)
    # Negative control: the layer-wise number moves, but with an order of heads.
    plain, moved = (_number(n, data, "layerwise", 1e-4) for n in (net, twin))
    if edit != "permuted heads":
        assert moved != pytest.approx(plain, rel=1e-4)


@hugging
def test_tokens_are_enough():
    """The vocabulary of the cases is read whole, so that no row of a table is without curvature."""
    assert len(_data("hugging-llama")[0].unique()) == TOKENS
