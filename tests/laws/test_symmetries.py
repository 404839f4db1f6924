"""What tracing claims about each architecture of the zoo is true, is a group, and has the dimension it should have."""

from dataclasses import replace

import pytest
import torch
from scipy import sparse
from torch import Tensor, nn

from cases.found import found_of
from cases.transformers import Scores
from cases.zoo import IMAGE, TOKENS, VARIANTS, ZOO, Apply, batch_norm, head, layer_norm, randomised, thinned
from isoflat.core.errors import SymmetryViolated
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.symmetry.finding.discover import symmetries
from isoflat.symmetry.finding.rules.elementwise import homogeneous
from isoflat.symmetry.found import Found
from isoflat.symmetry.groups.basis import BasisChange

NAMES = sorted(ZOO)
EACH = thinned(NAMES, VARIANTS)


def changed_by_finding(name: str) -> list[str]:
    """What finding symmetries changes about the user's model and torch."""
    net = ZOO[name].build().train()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 7.0)
    before, random, told = _snapshot(net), torch.random.get_rng_state(), repr(net)
    symmetries(net, ZOO[name].inputs(), verify=False)
    after = _snapshot(net)
    changed = [key for key in before | after if not torch.equal(before[key], after[key])]
    changed += [] if torch.equal(random, torch.random.get_rng_state()) else ["random numbers"]
    return changed + ([] if all(module.training for module in net.modules()) and repr(net) == told else ["modules"])


def _snapshot(net: nn.Module) -> dict[str, Tensor]:
    parts = {name: tensor.detach().clone() for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    return parts | {f"grad of {name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def _precise(found: Found) -> State:
    return found.state().to(dtype=torch.float64)


def _groups(found: Found):
    return (*found.symmetries, found.free)


def _distance(a: State, b: State) -> float:
    """Largest change of a tensor or constant relative to its size."""
    parts = [(a.tensors[name], b.tensors[name]) for name in a.tensors if a.tensors[name].is_floating_point()]
    parts += [(torch.tensor(a.constants[path]), torch.tensor(b.constants[path])) for path in a.constants]
    return max(float((x - y).abs().max() / (1 + x.abs().max())) for x, y in parts)


@pytest.mark.parametrize("name", EACH)
def test_outputs_stay(name):
    """Factors of e³ and constants of 0.3, on the rows that were traced and on more of them."""
    found = found_of(name, blind=False)
    assert found.verify(spread=3.0) <= 1e-10
    assert found.verify(ZOO[name].inputs(9, seed=5), spread=3.0, seed=1) <= 1e-10


KINDS = {"mlp-bias", "vgg-batch", "embedded", "tied", "frozen", "weight-normed", "lstm", "multihead-fused"}
"""Traced once more, to see what tracing leaves behind; all others are in the slow tests."""


@pytest.mark.parametrize("name", thinned(NAMES, set(NAMES) - KINDS))
def test_the_users_model_stays(name):
    assert changed_by_finding(name) == []


@pytest.mark.parametrize("name", EACH)
def test_group_laws(name):
    """Each part acts as (ℝᵈ, +): zero does nothing, −a undoes a, b after a is a + b; changes of basis along a line only."""
    found = found_of(name, blind=False)
    state = _precise(found)
    for group in _groups(found):
        a, b = (group.sample(stream(0, name, label), 0.7) for label in "ab")
        assert _distance(group.act(state, torch.zeros_like(a)), state) <= 1e-15
        assert _distance(group.act(group.act(state, a), -a), state) <= 1e-12
        b = a / 2 if isinstance(group, BasisChange) else b
        assert _distance(group.act(group.act(state, a), b), group.act(state, a + b)) <= 1e-12


@pytest.mark.parametrize("name", EACH)
def test_velocity_is_the_derivative_of_the_action(name):
    """By differences: the error of the fourth order in h, and rounding over h, are both about 1e-12."""
    found = found_of(name, blind=False)
    state = _precise(found)
    for group in _groups(found):
        rates = group.sample(stream(1, name), 1.0)
        velocity = group.velocity(state, rates)
        moved = {h: group.act(state, h * rates).tensors for h in (1e-3, -1e-3, 2e-3, -2e-3)}
        assert {key for key, speed in velocity.items() if bool(speed.any())} <= group.touches
        for key, tensor in state.tensors.items():
            if not tensor.is_floating_point():
                continue
            slope = _richardson(lambda h, key=key, moved=moved: moved[h][key])
            expected = velocity.get(key, torch.zeros_like(slope))
            assert (slope - expected).abs().max() <= 1e-9 * (1 + tensor.abs().max() + expected.abs().max())


def _richardson(value, h: float = 1e-3):
    """Central difference, extrapolated from two steps."""
    near, far = ((value(k * h) - value(-k * h)) / (2 * k * h) for k in (1, 2))
    return (4 * near - far) / 3


@pytest.mark.parametrize("name", EACH)
def test_generators_lie_in_the_kernel_of_the_jacobian(name):
    """`J v = 0` for the velocity v of a random element, which is zero only if every generator's is. Torch has no forward
    derivative by statistics and epsilons, nor for some operations: those enter by a difference, small against kinks."""
    found = found_of(name, blind=False)
    state = _precise(found)
    for group in found.symmetries:
        rates = group.sample(stream(2, name), 1.0)
        velocity = group.velocity(state, rates)
        parts = [_directional(found, state, key, value) for key, value in velocity.items()]
        if group is found.scaling and state.constants:
            parts.append(_richardson(lambda h, rates=rates: found.output(_epsilons(found, state, h * rates)), 1e-5))
        if parts:
            size = max(float(part.norm()) for part in (*parts, *velocity.values()))
            assert torch.stack(parts).sum(0).norm() <= 1e-9 * size


def _directional(found: Found, state: State, key: str, velocity: Tensor) -> Tensor:
    """Derivative of the output when one tensor moves."""
    tensor, velocity = state.tensors[key], velocity.reshape(state.tensors[key].shape).clone()
    if key not in state.buffers:
        try:
            return torch.func.jvp(lambda moved: found.output(state.replace({key: moved})), (tensor,), (velocity,))[1]
        except (NotImplementedError, RuntimeError) as error:
            assert "forward AD" in str(error) or "autograd" in str(error)
    return _richardson(lambda h: found.output(state.replace({key: tensor + h * velocity})), 1e-5)


def _epsilons(found: Found, state: State, element: Tensor) -> State:
    factors = found.scaling.epsilons(element)
    return replace(state, constants={path: value * factors.get(path, 1.0) for path, value in state.constants.items()})


# Generators of different groups that are the same direction. A common vector whose entries are all equal is a constant too,
# that of a table whose mean is lost: one for each table with common vectors. A pair of 6×5 and 4×6 leaves a coordinate
# that is not fed free against two that are not read.
SHARED = {
    "embedded": 2, "tied": 1, "decoder-layer": 1, "positioned-untied": 1, "hugging-gpt2": 1, "hugging-bert": 2,
    "linear-chain-wide": (6 - 5) * (6 - 4),
}  # fmt: skip


@pytest.mark.parametrize("name", thinned((name for name in NAMES if not name.startswith("dead")), VARIANTS))
def test_dimensions_are_honest(name):
    """Generators are linearly independent as vectors on all tensors: the dimension is that of the group, not of a list.

    So are those of all groups together, but for what is listed.
    """
    found = found_of(name, blind=False)
    state = _precise(found)
    assert _rank(_generators(found.free, state)) == found.free.dimension
    columns = [_generators(group, state) for group in found.symmetries]
    for group, part in zip(found.symmetries, columns, strict=True):
        assert _rank(part) == group.dimension
    assert _rank(torch.cat(columns, 1)) == found.dimension - SHARED.get(name, 0)


def _generators(group, state: State) -> Tensor:
    """Velocities of all coordinates, as columns over all tensors."""
    floating = {key: tensor for key, tensor in state.tensors.items() if tensor.is_floating_point()}
    columns = torch.zeros(sum(t.numel() for t in floating.values()), group.dimension, dtype=torch.float64)
    for i, rates in enumerate(torch.eye(group.dimension, dtype=torch.float64)):
        moving = group.velocity(state, rates)
        parts = [moving.get(key, torch.zeros_like(tensor)).reshape(-1) for key, tensor in floating.items()]
        columns[:, i] = torch.cat(parts)
    return columns


def _rank(columns: Tensor) -> int:
    """Of columns brought to one length; nothing may lie between what counts and rounding."""
    if not columns.numel():
        return 0
    values = torch.linalg.svdvals(columns / columns.norm(dim=0))
    assert not bool(((values > 1e-12 * values[0]) & (values < 1e-6 * values[0])).any())
    return int((values > 1e-6 * values[0]).sum())


# Scaling (exact), scaling without epsilon, translation, common vector. Units of each layer, counted by hand:
BASIC = (4, 4, 4, 6, 6, 6)  # channels of the normalisations: stem, two of a block, two of the next, its branch
NECK = (2, 2, 2, 4, 4, 2, 2, 4)
STREAMS = {"basic": (4 + 6) + (4 + 6), "neck": (2 + 4) + (2 + 2 + 2 + 2)}  # streams, and units inside of branches
MOBILE = (3, 4, 4, 2, 4, 4, 2, 4)
DIMENSIONS = {
    "mlp-bias": (6 + 5,) * 2 + (0, 0),
    "mlp-plain": (6 + 5,) * 2 + (0, 0),
    "lenet-bias": (3 + 4 + 5,) * 2 + (0, 0),
    "lenet-plain": (3 + 4 + 5,) * 2 + (0, 0),
    # Each channel of a batch normalisation: row against mean and gain, deviation against gain, gain against reader;
    # its mean against its offset.
    "vgg-batch": (3 * (4 + 3),) * 2 + (4 + 3, 0),
    "vgg-free": (4 + 3,) * 2 + (0, 0),
    **{f"homogeneous-{kind}": (5 + 5,) * 2 + (0, 0) for kind in ("leaky", "prelu", "square")},
    **{f"smooth-{kind}": (0, 0, 0, 0) for kind in ("gelu", "silu", "tanh")},
    "half-smooth": (5, 5, 0, 0),
    "linear-pair": (3 + 5,) * 2 + (3, 0),
    **{f"pool-{kind}": (3 + 4,) * 2 + (3, 0) for kind in ("maximum", "mean", "adaptive")},
    **{f"pool-{kind}": (3 + 4,) * 2 + (0, 0) for kind in ("padded", "override")},
    "transposed-convolution": (4 + 6,) * 2 + (0, 0),
    "one-dimension": (4 + 4,) * 2 + (0, 0),
    "shuffled": (8 // 4 + 3,) * 2 + (0, 0),
    # Two summands before an activation may exchange constants: the channels of the downsampled stream.
    "resnet-basic-free": (STREAMS["basic"],) * 2 + (6, 0),
    "resnet-basic-batch": (STREAMS["basic"] + 2 * sum(BASIC),) * 2 + (sum(BASIC) + 6, 0),
    # One factor for each group; exact where the two groups behind one epsilon share it.
    "resnet-basic-group": (STREAMS["basic"] + len(BASIC), STREAMS["basic"] + 2 * len(BASIC), 6, 0),
    "resnet-bottleneck-free": (STREAMS["neck"],) * 2 + (4, 0),
    "resnet-bottleneck-batch": (STREAMS["neck"] + 2 * sum(NECK),) * 2 + (sum(NECK) + 4, 0),
    "resnet-bottleneck-group": (STREAMS["neck"] + len(NECK), STREAMS["neck"] + 2 * len(NECK), 4, 0),
    # Two normalisations write the stream of two channels; behind ReLU6 nothing else has a scale. Their offsets are taken up
    # by the running means behind the next convolutions.
    "mobilenet-relu": (3 * sum(MOBILE) - 2,) * 2 + (sum(MOBILE) + 2 * 2, 0),
    "mobilenet-relu6": (2 * sum(MOBILE) + 2,) * 2 + (sum(MOBILE) + 2 * 2, 0),
    "grouped": (4 + 6,) * 2 + (0, 0),
    "densenet": (3 + 2 + 2,) * 2 + (0, 0),
    "densenet-batch": ((3 + 2 + 2) + 2 * (3 + 5 + 7),) * 2 + (3 + (3 + 5 + 7), 0),
    "zero-branch": (4 + 5,) * 2 + (4, 0),
    # Stream, two hidden layers, three gains; offsets into biases and the stream's mean for each of three writers; a
    # vector for each writer's columns, and for the rows of what reads a normalisation.
    "pre-norm-layer": (1 + 2 * 5 + 3 * 4,) * 2 + (3 * 4 + 3, (3 + 5 + 5) + (5 + 5 + 3)),
    "pre-norm-rms": (1 + 2 * 5 + 3 * 4,) * 2 + (0, 0),
    "pre-norm-hand": (1 + 2 * 5 + 3 * 4,) * 2 + (0, 0),
    # Two streams, two hidden layers, the last gain. Constants travel from a stream into the branch's output; the mean of
    # each sum; the last offset into the head, which alone reads a gain that nothing else does.
    "post-norm-layer": (2 * (1 + 5) + 4,) * 2 + (2 * (4 + 1) + 4, 5 + 5 + 3),
    "post-norm-rms": (2 * (1 + 5) + 4,) * 2 + (4, 0),
    "post-norm-hand": (2 * (1 + 5) + 4,) * 2 + (4, 0),
    "two-offsets": (2 + 4,) * 2 + (4 + 2, 3 + 3),
    "norm-of-part": (4, 4 + 1, 1, 0),
    "shared-linear": (4, 4, 0, 0),
    "shared-block": (4 + 4 + 1, 4 + 4 + 2, 4 + 2, 3 + 4),
    "shared-norm": (4, 4 + 1, 1, 4),
    "padded-and-shared": (2, 2, 0, 0),  # two more for the columns that read zeros first: held, on purpose
    "shared-affine": (3 * 3,) * 2 + (3, 0),
    "frozen": (5 + 6,) * 2 + (0, 0),
    # Tables against each other and along the mean, two offsets, one bias; vectors for 7 + 3 rows and 5 columns, and for
    # the rows of the hidden layer and the head, which read normalisations.
    "embedded": (1 + 5 + 2 * 4,) * 2 + (4 + 1 + 2 * 4 + 1, 7 + 3 + 5 + (5 + TOKENS)),
    "tied": (1 + 5 + 4,) * 2 + (1 + 4 + 1, 3 + 5 + 5),
    "dead-unit": (6 + 5,) * 2 + (0, 0),
    "dead-chain": (6 + 5 + 5,) * 2 + (0, 0),
    "bilinear": (2 * 5,) * 2 + (0, 0),
    "gated": (5, 5, 0, 0),
    "weight-normed": (5 + 5,) * 2 + (0, 0),
    "sorted-units": (5, 5, 0, 0),
    "custom": (4, 4, 0, 0),
    "lstm": (0, 0, 4 * 2, 0),
    "reduced-tables": (5, 5, 0, 0),
}

# Transformers. Two heads of two: four scales between queries and keys, four between values and outputs; the scores ignore a
# constant in the keys, and the outputs take one in the values. HIDDEN: layers with ReLU around the attention.
QK = VO = KEYS = VALUES = 2 * 2
HIDDEN = 4 + 4
OUTER = HIDDEN + QK + VO
DIMENSIONS |= {
    **{f"multihead-{kind}": (OUTER,) * 2 + (KEYS + VALUES, 0) for kind in ("fused", "eager", "extra", "extra-eager")},
    "multihead-bare": (OUTER,) * 2 + (0, 0),
    "multihead-zero": (OUTER,) * 2 + (0, 0),  # a key and a value of zeros stay: no constants
    "multihead-cross": (OUTER + 4 + 4,) * 2 + (KEYS + VALUES, 0),  # memories behind ReLU
    "multihead-widths": (OUTER + 5 + 6,) * 2 + (KEYS + VALUES, 0),
    **{
        f"attention-{kind}": (OUTER,) * 2 + (KEYS + VALUES, 0)
        for kind in ("separate", "fused", "chunked", "unbound", "by-head")
    },
    "attention-bare": (OUTER,) * 2 + (0, 0),
    # Four heads of queries: the keys' two groups count.
    **{
        f"grouped-queries-{kind}": (OUTER,) * 2 + (KEYS + VALUES, 0)
        for kind in ("repeated", "expanded", "flagged", "broadcast")
    },
    "grouped-queries-single": (HIDDEN + 2 + 2,) * 2 + (2 + 2, 0),
    # Two groups of size four: a scale for each pair that turns, for each coordinate that does not; values. Constants in
    # keys that turn are seen.
    "rotary-halves": (HIDDEN + 2 * 2 + 2 * 4,) * 2 + (2 * 4, 0),
    "rotary-neighbours": (HIDDEN + 2 * 2 + 2 * 4,) * 2 + (2 * 4, 0),
    "rotary-partial": (HIDDEN + 2 * (1 + 2) + 2 * 4,) * 2 + (2 * 4 + 2 * 2, 0),
    # Gains of queries against those of keys, by coordinate or by pair; each head's queries and keys are divided out, with
    # one epsilon for both heads.
    "query-norm-plain": (HIDDEN + 4 + 2 + 2 * 4, HIDDEN + 4 + 4 + 2 * 4, 2 * 4, 0),
    "query-norm-turned": (HIDDEN + 2 + 2 + 2 * 4, HIDDEN + 2 + 4 + 2 * 4, 2 * 4, 0),
    **{f"glu-{kind}": (HIDDEN + 5,) * 2 + (0, 0) for kind in ("swish", "packed")},
    **{f"glu-{kind}": (HIDDEN + 2 * 5,) * 2 + (0, 0) for kind in ("bilinear", "bilinear-packed")},
    "linear-chain-two": (5 + 3 + 4,) * 2 + (3, 0),
    "linear-chain-wide": (5 + 6 + 4,) * 2 + (6, 0),
    "linear-chain-three": (5 + 3 + 4 + 4,) * 2 + (3 + 4, 0),
    "linear-chain-joined": (5 + 5 + 4,) * 2 + (5, 0),
    "linear-chain-bare": (5 + 3 + 4,) * 2 + (0, 0),
}

# Normalised before: the stream, gains of both normalisations, heads, units behind ReLU. Constants: keys, values, two
# offsets; the stream's mean from all writers but the last, of which everything can go to the head. Common vectors: rows of
# what reads a normalisation.
GAINS = OFFSETS = 4 + 4
ATTENDING = QK + VO
MOVED = KEYS + VALUES
READ = 3 * 4 + 5
DIMENSIONS |= {
    "torch-encoder-pre-relu": (1 + GAINS + ATTENDING + 5,) * 2 + (MOVED + OFFSETS + (1 + 1 + 4), READ),
    "torch-encoder-pre-gelu": (1 + GAINS + ATTENDING,) * 2 + (MOVED + OFFSETS + (1 + 1 + 4), READ),
    # Two layers and a last normalisation: five writers to the stream, whose columns have common vectors.
    "torch-encoder-stack": (1 + 2 * GAINS + 4 + 2 * ATTENDING + 2 * 5,) * 2
    + (2 * (MOVED + OFFSETS) + 4 + 5, 2 * READ + 3 + (3 + 2 * (4 + 5))),
    # Normalised after: two streams, the last gain. A constant of a stream goes into the branch's output; the mean of each
    # sum; the last offset. Columns of what writes into the sums, rows of the head.
    **{
        f"torch-encoder-{kind}": (1 + 1 + 4 + ATTENDING + units,) * 2 + (MOVED + 2 * (4 + 1) + 4, 4 + 5 + 3)
        for kind, units in (("post-relu", 5), ("post-gelu", 0), ("positions-first", 5))
    },
    # No biases: neither offsets nor anything that reads a normalisation has anywhere to put a constant.
    "decoder-layer": (1 + 3 * 4 + 2 * 2 + 2 * 4 + 5,) * 2 + (1, TOKENS + 4 * 4 + 5),
    "decoder-rms": (1 + 3 * 4 + 2 * 2 + 2 * 4 + 5,) * 2 + (0, 0),
    "decoder-hand": (1 + 3 * 4 + 2 * 2 + 2 * 4 + 5,) * 2 + (0, 0),
    # The mean of the table and of each of four positions, tables against each other (of which one is in there already),
    # the mean of the output's bias. A head that is the table of tokens leaves it neither constants nor a last gain.
    "positioned-untied": (1 + 2 * 4 + ATTENDING,) * 2 + (MOVED + 4 + (1 + 4 + 4 - 1) + 1, TOKENS + 4 + 3 * 4),
    "positioned-tied": (1 + 4 + ATTENDING,) * 2 + (MOVED + 4 + 4 + 1, 4 + 3 * 4),
    # Four units of a stream that is read linearly; five writers.
    "normless": (4 + 2 * (ATTENDING + 5),) * 2 + (2 * MOVED + 5 * 4, 0),
    # The mean of each of five positions, the first against the token, the others against the patches.
    "vision": (1 + 3 * 4 + ATTENDING,) * 2 + (MOVED + 3 * 4 + (5 + 4 + 4) + 2, 2 * 3 * 3 + 4 + 5 + READ + 3),
    # Two ranks of two. The offset before them would have to pass two weights; so would what reads it.
    **{
        f"adapters-{kind}": (1 + GAINS + ATTENDING + 2 + 2,) * 2 + (MOVED + 2 + 4, 3 + 4 + 3)
        for kind in ("random", "zero", "frozen")
    },
    # Gates that open and close have one bias too many, the candidate has not; four gates of an LSTM all have.
    "recurrent-gru": (0, 0, 2 * 2, 0),
    "recurrent-lstm-projected": (0, 0, 4 * 4, 0),
    # The head is the table of tokens; six positions with one mean (constants come as whole rows of a table).
    "hugging-gpt2": (2 * (QK + VO) + 4 * 4 + 1,) * 2 + (2 * (MOVED + OFFSETS + 2) + 1, 6 + 2 * (4 + 5) + 2 * READ),
    # Stream, five gains of eight; for each layer two groups of two pairs and of four values, five gated units.
    "hugging-llama": (1 + 5 * 8 + 2 * (2 * 2 + 2 * 4 + 5),) * 2 + (0, 0),
    # The sum of tables, four streams between normalisations, the last gain. Of three tables the first has a padding row:
    # the others against each other, and their mean. Rows of both, columns of branches, rows of the pooler.
    "hugging-bert": (1 + 4 + 4 + 2 * ATTENDING,) * 2 + ((4 + 1) + 2 * MOVED + 5 * 4 + 4, (6 + 2) + 2 * (4 + 5) + 4),
    "hugging-vit": (1 + 5 * 4 + 2 * ATTENDING,) * 2
    + (2 * (MOVED + OFFSETS + 2) + 4 + (5 + 4 + 4), 2 * 3 * 3 + 2 * (4 + 5) + 2 * READ + 3),
    # Three normalisations, two attentions, a memory behind ReLU.
    "torch-decoder-pre": (1 + 3 * 4 + 2 * ATTENDING + 4 + 5,) * 2 + (2 * MOVED + 2 * 4 + (3 + 4), READ),
    "torch-decoder-post": (3 + 4 + 2 * ATTENDING + 4 + 5,) * 2 + (2 * MOVED + 2 * (4 + 1) + 1 + 4, 4 + 4 + 5 + 3),
}

# Changes of basis beside scalings. GL(d) leaves d² − d, rotations d (d − 1) / 2, with a fixed mean one dimension less.
HEADS = 2 * 2 + 2 * 2  # two heads of two, queries against keys and values against outputs
STREAM, CENTRED = 4 * 3 // 2, 3 * 2 // 2
TURNED = 2 * 2 * 1 + 2 * (16 - 4)  # two groups: two planes each, values of four
BASES = {
    "linear-pair": 6, "pre-norm-rms": STREAM, "pre-norm-hand": STREAM,
    **dict.fromkeys(["pre-norm-layer", "shared-block", "embedded"], CENTRED),
    **{f"multihead-{kind}": HEADS for kind in ("fused", "bare", "eager", "extra")},
    **{f"attention-{kind}": HEADS for kind in ("separate", "fused", "bare", "chunked", "unbound", "by-head")},
    **{f"grouped-queries-{kind}": HEADS for kind in ("repeated", "expanded", "flagged", "broadcast")},
    # Weights that are cut in two before they are used: attention to something else, in torch's module.
    **{f"multihead-{kind}": HEADS for kind in ("cross", "widths")},
    # Not found: rotations of a stream that is read by part of a weight; values beside a stored one, in attention written
    # out; anything about a key of zeros.
    "torch-decoder-pre": 2 * HEADS, "torch-decoder-post": 2 * HEADS, "multihead-extra-eager": 2 * 2,
    "grouped-queries-single": 2 + 2,
    "rotary-halves": TURNED, "rotary-neighbours": TURNED, "rotary-partial": 2 * (1 + 2) + 2 * (16 - 4),
    # Gains of a head's coordinates stand between queries and keys.
    "query-norm-plain": 2 * (16 - 4), "query-norm-turned": 2 * (16 - 4),
    "linear-chain-two": 6, "linear-chain-wide": 30, "linear-chain-three": 6 + 12, "linear-chain-joined": 20,
    "linear-chain-bare": 6,
    "torch-encoder-pre-relu": CENTRED + HEADS, "torch-encoder-pre-gelu": CENTRED + HEADS,
    "torch-encoder-stack": CENTRED + 2 * HEADS,
    **{f"torch-encoder-{kind}": HEADS for kind in ("post-relu", "post-gelu", "positions-first")},
    "decoder-layer": CENTRED + TURNED, "decoder-rms": STREAM + TURNED, "decoder-hand": STREAM + TURNED,
    "positioned-untied": CENTRED + HEADS, "positioned-tied": HEADS, "vision": CENTRED + HEADS,
    "normless": 12 + 2 * HEADS,
    **{f"adapters-{kind}": CENTRED + HEADS + 2 + 2 for kind in ("random", "zero", "frozen")},
    "hugging-gpt2": 2 * HEADS, "hugging-bert": 2 * HEADS, "hugging-vit": CENTRED + 2 * HEADS,
    "hugging-llama": 8 * 7 // 2 + 2 * TURNED,
}  # fmt: skip


@pytest.mark.parametrize("name", EACH)
def test_dimensions(name):
    found = found_of(name, blind=False)
    counted = (found.scaling, found.free, found.translation, found.common, found.basis)
    assert tuple(group.dimension for group in counted) == (*DIMENSIONS[name], BASES.get(name, 0))


@pytest.mark.skipif("hugging-llama" not in ZOO, reason="needs transformers")
def test_dimensions_of_a_llama():
    """By kind, as the theory has it: stream, gains, rotary planes with their lengths, values, gated units."""
    found = found_of("hugging-llama", blind=False)
    assert found.scaling.dimension == 75
    assert found.dimension == 29 + 5 * 8 + 16 + 4 * 4**2 + 2 * 5


@pytest.mark.slow
@pytest.mark.skipif("hugging-gpt2" not in ZOO, reason="needs transformers")
def test_dimensions_of_gpt2():
    """GPT-2 small, from its own configuration: twelve layers of twelve heads."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Scores(GPT2LMHeadModel(GPT2Config())).eval()
    found = symmetries(net, torch.arange(16).view(2, 8), verify=False)
    width, layers = 768, 12
    assert found.scaling.dimension == layers * (2 * width + 2 * width) + 1 == 36_865
    # Keys, values and two offsets of each layer; the mean of both writers, and of the positions.
    assert found.translation.dimension == layers * (4 * width + 2) + 1
    keys = [offset for offset in found.translation.offsets if offset.entry.name.endswith("attn.c_attn.bias")]
    moved = sum(int((offset.own[width : 2 * width].getnnz(axis=1) > 0).sum()) for offset in keys)
    assert moved == layers * width == 9_216


@pytest.mark.parametrize(
    ("name", "operation", "tensors"),
    [
        ("smooth-gelu", "gelu", ["0.weight rows", "0.bias", "2.weight rows"]),
        ("smooth-silu", "silu", ["0.weight rows", "2.bias"]),
        ("smooth-tanh", "tanh", ["0.weight rows", "2.bias"]),
        ("half-smooth", "gelu", ["2.weight rows", "2.bias"]),
        ("mobilenet-relu6", "hardtanh", ["0.1.bias"]),
        ("sorted-units", "sort", ["2.weight rows", "2.bias"]),
        ("custom", "isoflat_zoo", ["0.weight rows", "0.bias"]),
        ("gated", "sigmoid", ["0.branches.1.0.weight rows"]),
    ],
)
def test_what_is_not_claimed_is_named(name, operation, tensors):
    """The report says which units have no scale, and which operation it is that fixes them."""
    lines = [line for line in found_of(name, blind=False).report if line.kind == "not claimed"]
    for tensor in tensors:
        assert any(tensor in line.tensors and operation in "".join(line.reasons) for line in lines), lines
    assert "not claimed" in str(found_of(name, blind=False))


@pytest.mark.parametrize("name", ["mlp-plain", "resnet-basic-free", "densenet", "bilinear"])
def test_nothing_is_withheld_without_a_reason(name):
    assert all(line.kind != "not claimed" for line in found_of(name, blind=False).report)


# Traps ----------------------------------------------------------------------------------------------------------------


F = nn.functional


def _statistics(x, norm, gain, offset):
    return F.batch_norm(x, norm.running_mean, norm.running_var, gain, offset)


TRAPS = {
    "columns of a weight with one input are its entries": lambda: Apply(
        lambda x, w, v: F.linear(F.linear(F.linear(x, v), w), v.new_ones(3, 2)) + w.sum(), (2, 1), (1, 4)
    ),
    "a large table that is also a head is read entry by entry": lambda: Apply(
        lambda x, table, layer: (table((x[:, 0] > 0).long()) + layer(x)) @ table.weight.t(),
        nn.Embedding(600, 500), nn.Linear(4, 500),
    ),
    "a large matrix that is also averaged": lambda: Apply(
        lambda x, layer, last, w: last(torch.relu(torch.relu(layer(x)) @ w + w.mean(0))),
        nn.Linear(4, 600), nn.Linear(500, 3), (600, 500),
    ),
    "a mean that takes up constants and is read besides": lambda: Apply(
        lambda x, first, layer, norm, last: last(torch.relu(norm(layer(first(x)))) + norm.running_mean[:, None, None]),
        nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1, bias=False), batch_norm(3), head(3),
    ),
    "a layer normalised after a copy that is asserted": lambda: Apply(
        lambda x, layer, norm, last: last(torch.relu(norm(layer(x).to(torch.float64).flip(0)))),
        nn.Linear(4, 4), layer_norm(4), nn.Linear(4, 3),
    ),
    "a gain that is computed is no gain": lambda: Apply(
        lambda x, layer, norm, last: last(torch.relu(_statistics(layer(x), norm, 2 * norm.weight, 2 * norm.bias))),
        nn.Conv2d(2, 3, 1), batch_norm(3), head(3),
    ),
    "a variance that is read besides": lambda: Apply(
        lambda x, layer, norm, last: last(torch.relu(norm(layer(x))) * norm.running_var[:, None, None]),
        nn.Conv2d(2, 3, 1), batch_norm(3), head(3),
    ),
    "a mean that is read besides": lambda: Apply(
        lambda x, layer, norm, last: last(torch.relu(norm(layer(x))) + norm.running_mean[:, None, None]),
        nn.Conv2d(2, 3, 1), batch_norm(3), head(3),
    ),
    "channels of zeros have a running mean": lambda: Apply(
        lambda x, layer, norm, last: last(norm(F.pad(layer(x), (0, 0, 0, 0, 0, 2)))),
        nn.Conv2d(2, 2, 3), batch_norm(4), head(4),
    ),
    "some rows of a normalised sequence are not the layer's": lambda: Apply(
        lambda x, norm, last, first: last(torch.relu(norm(torch.cat([first.expand(len(x), 1, 4), x[:, None]], 1)))),
        layer_norm(4), nn.Linear(4, 3), (1, 1, 4),
    ),
    "an index that depends on the input": lambda: Apply(
        lambda x, last, table: last(torch.index_select(table, 0, (x[:, 0] > 0).long())), nn.Linear(4, 3), (2, 4)
    ),
    "a computed bias": lambda: Apply(
        lambda x, layer, w, v: torch.relu(torch.addmm(layer(x), x, w)) @ v, nn.Linear(4, 3), (4, 3), (3, 2)
    ),
    "units are expanded where activations are not": lambda: Apply(
        lambda x, layer, last: last(torch.relu(layer(x)).transpose(2, 3).flatten(1)),
        nn.Conv2d(2, 3, 1), nn.Linear(3 * 6 * 6, 3),
    ),
    "control flow": lambda: Apply(
        lambda x, layer, last: last(torch.cond(x.sum() > 0, torch.relu, torch.neg, (layer(x),))),
        nn.Linear(4, 3), nn.Linear(3, 2),
    ),
}  # fmt: skip


class Twice(nn.Module):
    """One normalisation under two names, with one epsilon."""

    def __init__(self):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm = layer_norm(4)
        self.again = self.norm

    def forward(self, x):
        return self.last(self.again(torch.relu(self.between(torch.relu(self.norm(self.first(x)))))))


TRAPS["a module under two names"] = Twice


@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap):
    """Each of these once made for a claim that was wrong, or for an error that says nothing."""
    net = randomised(TRAPS[trap]().double().eval(), torch.Generator().manual_seed(0))
    image = any(isinstance(part, nn.Conv2d) for part in net.modules())
    shape = IMAGE if image else (4,)
    inputs = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert symmetries(net, inputs, verify=False).verify(spread=3.0) <= 1e-10


# Negative controls ----------------------------------------------------------------------------------------------------

CONTROLS = ["mlp-bias", "resnet-basic-batch", "resnet-basic-group", "pre-norm-layer", "embedded", "grouped", "bilinear"]


@pytest.mark.parametrize("name", CONTROLS)
def test_one_wrong_exponent_is_refuted(name):
    """Whichever tensor it is in: a first unit that scales by one power too many changes the output."""
    found = found_of(name, blind=False)
    group = found.scaling
    for i, entry in enumerate(group.tensors):
        for side in ("first", "second"):
            rows = getattr(entry, side)
            if rows.nnz == 0:
                continue
            extra = sparse.csr_matrix(([1.0], ([0], [int(rows.indices[0])])), shape=rows.shape)
            tensors = (*group.tensors[:i], replace(entry, **{side: rows + extra}), *group.tensors[i + 1 :])
            wrong = replace(found)
            vars(wrong)["scaling"] = replace(group, tensors=tensors)
            with pytest.raises(SymmetryViolated):
                wrong.verify(ZOO[name].inputs(16))


@pytest.mark.parametrize("name", ["resnet-basic-batch", "pre-norm-layer", "embedded", "linear-pair", "lstm"])
def test_one_wrong_shift_is_refuted(name):
    """A first unit of a bias, offset or table that shifts by more than the others take back."""
    found = found_of(name, blind=False)
    group = found.translation
    for i, offset in enumerate(group.offsets):
        if offset.own.nnz == 0:
            continue
        unit = int(offset.own.nonzero()[0][0])
        extra = sparse.csr_matrix(([1.0], ([unit], [int(offset.own.indices[0])])), shape=offset.own.shape)
        offsets = (*group.offsets[:i], replace(offset, own=offset.own + extra), *group.offsets[i + 1 :])
        with pytest.raises(SymmetryViolated):
            replace(found, translation=replace(group, offsets=offsets)).verify(ZOO[name].inputs(16))


@pytest.mark.parametrize(("name", "rule"), [("half-smooth", "gelu"), ("smooth-tanh", "tanh")])
def test_a_wrong_rule_is_refuted(name, rule):
    """Whoever says that GELU or tanh is homogeneous is told so before anything is returned."""
    with pytest.raises(SymmetryViolated):
        symmetries(ZOO[name].build(), ZOO[name].inputs(), further_rules={f"aten.{rule}.default": homogeneous})


def test_a_right_rule_adds_what_was_missing():
    """`cubed` is homogeneous of degree three: with a rule for it five more units scale."""

    def cube(constraints, node, x):
        made = homogeneous(constraints, node, x)
        return replace(made, scale=constraints.scales.combine((3, made.scale)))

    rules = {"isoflat_zoo.cubed.default": cube}
    found = symmetries(ZOO["custom"].build(), ZOO["custom"].inputs(), further_rules=rules)
    assert found.scaling.dimension == 5 + 4


def test_a_loss_that_ignores_common_scores():
    """Cross-entropy frees one constant of the head's bias and one vector of its 5 columns; squares do not."""
    net, inputs = ZOO["mlp-bias"].build(), ZOO["mlp-bias"].inputs()
    blind = symmetries(net, inputs, loss=nn.functional.cross_entropy)
    assert (blind.translation.dimension, blind.common.dimension) == (1, 5)
    assert blind.verify(spread=3.0) <= 1e-10
    seeing = symmetries(net, inputs, loss=lambda scores, y: (scores - nn.functional.one_hot(y, 3)).square().mean())
    assert (seeing.translation.dimension, seeing.common.dimension) == (0, 0)
    assert blind.hash != seeing.hash
