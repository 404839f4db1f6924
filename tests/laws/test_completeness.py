"""Nothing is missing: the null space of the network's Jacobian, restricted to directions that a scaling or a shift of a
bias could have, has exactly the dimension of what tracing found.

Directions V: every row and every column of each weight times a factor of its own (columns of each group where a
convolution is grouped), and every entry of each bias, gain and offset by itself. With many more inputs than directions,
and units that are active on some and inactive on others, J V loses rank at symmetries only: rank V − rank J V is their
number. From what was found, those combinations are compared that move trainable tensors inside of V and nothing else.
Epsilons are zero on both sides, so that scales divided out count.

Of transformers, all parameters are directions, and everything found is compared: changes of basis and common vectors too."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cases.found import found_of
from cases.transformers import TRANSFORMERS, Scores, llama
from cases.zoo import TOKENS, VARIANTS, ZOO, randomised, thinned
from isoflat.core.state import State
from isoflat.symmetry.finding.discover import symmetries
from isoflat.symmetry.found import Found

aten = torch.ops.aten

GAP = 1e3
"""Between singular values that are counted and those that are not, at least."""

ROWS = 150
"""Of input: with three outputs or more each, several times the number of directions."""

# Found is less than there is, for a reason that is known: how many, and which.
MISSING = {
    # A mean that divides by a number other than that of its terms multiplies a constant by the same fraction everywhere.
    "pool-override": 3,
    "pool-padded": 3,
    "padded-and-shared": 2,  # columns that read zeros first: held, on purpose
    "sorted-units": 2,  # sorting commutes with one scale and one constant for all; it has no rule
}

# No subject: a null space of other origin (dead units, zeros, units that never reach six), directions that V does not hold
# (tables that are summed over; one gain and offset behind two sets of statistics, where shifts need scales), or no
# forward derivative in torch.
ELSEWHERE = {"dead-unit", "dead-chain", "zero-branch", "mobilenet-relu6", "reduced-tables", "shared-affine"}
ELSEWHERE |= {"custom", "weight-normed"}

# For transformers, with all parameters as directions; spelled in one way each. Not here: bilinear units (sums of products
# have relations of their own), and a vision transformer of one layer, whose only query is a constant.
LEFT = {
    "attention-separate": 0, "multihead-fused": 0, "multihead-extra": 0, "multihead-cross": 0, "multihead-widths": 0,
    "grouped-queries-flagged": 0, "grouped-queries-single": 0, "rotary-halves": 0, "rotary-partial": 0,
    "query-norm-plain": 0, "query-norm-turned": 0, "glu-swish": 0, "linear-chain-two": 0,
    "linear-chain-wide": 0, "linear-chain-three": 0, "linear-chain-joined": 0, "torch-encoder-stack": 0,
    "decoder-rms": 0, "positioned-tied": 0, "recurrent-gru": 0, "hugging-gpt2": 0, "hugging-llama": 0, "hugging-vit": 0,
    "multihead-zero": 2 * 4,  # bases of heads: what is joined with a known zero is held
    "multihead-extra-eager": 4,  # bases of values, joined with a stored one, in attention written out
    "recurrent-lstm-projected": 4,  # the state's basis: torch's own recurrence has no rule
    # An offset that no bias behind can take, against the mean column of what reads it: a combination of both alone keeps
    # what comes out.
    "positioned-untied": 4,
    # The same three times. And values of size four in a stream whose normalisation leaves three directions: with constants
    # that add up over heads, 80 numbers for 4 · 9 and 3; all but those of the bases, 2 · 16.
    "decoder-layer": 3 * 4 + (80 - 2 * (3 * 3 + 3 * 3) - 3 - 2 * 16),
    # What the head alone reads may be mixed into the mean, which no normalisation sees, with another scale; the last
    # writer may write what three scores of four coordinates do not see.
    "torch-encoder-pre-gelu": (3 + 1) + 5,
    # Rows of what reads a normalisation whose gain the residual reads too. A stream that a normalisation and linear maps
    # read: anything into its mean, 4 − 1 of which are no constants. Three features in four coordinates: rows on the
    # fourth. A curve of four gains with the same three singular values, between rotations on both sides.
    "torch-encoder-post-gelu": 5 + (4 - 1) + 3 * 4 + 1,
    # As after the first and before the last above, with one more map that reads the first stream, the memory's. Not found:
    # an offset that goes to the queries' part of a weight alone, rows there, rotations of a stream read so.
    "torch-decoder-post": 5 + (4 - 1) + (3 * 4 + 4) + (4 + 4),
    "torch-decoder-pre": (3 + 1) + 5 + 4 + (4 + 4 + 3),
    # Three features in four coordinates; a last writer before three scores.
    "normless": 12 + 5,
    # What an adapter adds, its base can take away, 2 · (8 + 8 − 4); an offset before both, and rows that read it.
    "adapters-random": 2 * (8 + 8 - 4) + 4 + 3 * 4,
    # Rows behind a gain that stays. A padding row, which may not move: its table's means, and constants against another.
    # A row of types that does not occur.
    "hugging-bert": 2 * (12 + 5) + (TOKENS + 3) + 3,
}  # fmt: skip

NAMES = sorted(set(ZOO) - ELSEWHERE - TRANSFORMERS)


HEAVY = {
    "normless", "hugging-llama", "hugging-vit", "hugging-bert", "attention-separate", "decoder-rms", "decoder-layer",
    "adapters-random", "multihead-cross", "multihead-zero", "mobilenet-relu", "densenet-batch", "hugging-gpt2",
    "recurrent-lstm-projected",
}  # fmt: skip
"""Left to the slow tests."""


@pytest.mark.parametrize("name", thinned(sorted(set(LEFT) & set(ZOO)), HEAVY | VARIANTS))
def test_null_space_of_all_parameters_is_what_was_found(name):
    """Every generator at once: scalings, shifts, common vectors, and changes of basis."""
    net, inputs = _whole(name)
    found = symmetries(net, inputs, verify=False)
    state = found.state().to(dtype=torch.float64)
    state = replace(state, constants=dict.fromkeys(state.constants, 0.0))
    groups = (found.free, found.translation, found.common, found.basis)
    velocities = [
        _flat(group.velocity(state, rates), state.parameters)
        for group in groups
        for rates in torch.eye(group.dimension, dtype=torch.float64)
    ]
    known, first = rank(torch.stack(velocities, 1))
    size = state.space.size
    moving, second = rank(_jacobian(found, state, inputs, torch.eye(size, dtype=torch.float64), together=True))
    assert min(first, second) > GAP
    assert size - moving == known + LEFT[name]


def _whole(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network whose every row of every table is read, in a stream that all tokens span."""
    generator = torch.Generator().manual_seed(3)
    if name == "hugging-llama":
        net = randomised(Scores(llama(12)).double().eval(), torch.Generator().manual_seed(0))
        return net, (torch.randint(12, (60, 4), generator=generator),)
    if name in ("hugging-gpt2", "hugging-bert"):
        return ZOO[name].build(), (torch.randint(TOKENS, (ROWS, 6), generator=generator),)
    return _lively(name, 0.1)


@pytest.mark.parametrize("name", thinned(NAMES, HEAVY | VARIANTS))
def test_null_space_is_what_was_found(name):
    net, inputs = _lively(name)
    found = found_of(name, net, blind=False)
    state = found.state().to(dtype=torch.float64)
    state = replace(state, constants=dict.fromkeys(state.constants, 0.0))
    directions = _directions(net, state)
    everything, first = rank(directions)
    moving, second = rank(_jacobian(found, state, inputs, directions))
    known, third = rank(_within(_found(found, state), directions))
    assert min(first, second, third) > GAP
    assert everything - moving == known + MISSING.get(name, 0)


class Sides(TorchDispatchMode):
    """Looks at what enters kinks: the smallest share of inputs on one side, over all units."""

    def __init__(self, axis: int):
        super().__init__()
        self.axis, self.share = axis, 0.5

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (aten.relu, aten.leaky_relu, aten.prelu, aten._prelu_kernel):
            active = (args[0].movedim(self.axis, 0).flatten(1) > 0).double().mean(1)
            self.share = min(self.share, float(torch.minimum(active, 1 - active).min()))
        return func(*args, **(kwargs or {}))


def _lively(name: str, share: float = 0.01) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The first network, by its random weights, each of whose units is active on a share of the inputs and inactive on
    another; inputs of several sizes, so that neither biases nor weights drown."""
    entry = ZOO[name]
    inputs = entry.inputs(ROWS, seed=3)
    if not entry.tokens:
        sizes = torch.logspace(-1, 1, ROWS, dtype=torch.float64)
        inputs = (inputs[0] * sizes.view(-1, *[1] * (inputs[0].ndim - 1)),)
    for seed in range(200):
        net = entry.build(seed)
        with Sides(1 if inputs[0].ndim == 4 or name == "one-dimension" else -1) as sides, torch.no_grad():
            net(*inputs)
        if sides.share > share:
            return net, inputs
    raise AssertionError("no such weights")


def rank(matrix: Tensor) -> tuple[int, float]:
    """Number of singular values before the largest gap, and that gap; columns are brought to one length first, and what is
    at rounding level is cut off."""
    lengths = matrix.norm(dim=0)
    matrix = matrix[:, lengths > 1e-12 * lengths.max()] if len(lengths) else matrix
    if not matrix.numel():
        return 0, float("inf")
    values = torch.linalg.svdvals(matrix / matrix.norm(dim=0))
    values = torch.cat([values, values.new_zeros(1)]).clamp(min=1e-13 * float(values[0]))
    ratios = values[:-1] / values[1:]
    place = int(ratios.argmax())
    return place + 1, float(ratios[place])


def _directions(net: nn.Module, state: State) -> Tensor:
    """V as columns over the trainable tensors."""
    groups = {id(m.weight): m.groups for m in net.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)}
    columns = []
    for name, tensor in state.parameters.items():
        mask = torch.zeros_like(tensor)
        masks = []
        if tensor.ndim <= 1:
            masks = [one.view(tensor.shape) for one in torch.eye(tensor.numel(), dtype=tensor.dtype)]
        else:
            parts = groups.get(id(net.get_parameter(name)), 1)
            for i in range(tensor.shape[0]):
                masks.append(mask.clone().index_fill_(0, torch.tensor(i), 1.0) * tensor)
            rows = tensor.shape[0] // parts
            for g in range(parts):
                for j in range(tensor.shape[1]):
                    one = mask.clone()
                    one[g * rows : (g + 1) * rows, j] = 1.0
                    masks.append(one * tensor)
        columns += [{name: part} for part in masks]
    return torch.stack([_flat(column, state.parameters) for column in columns], 1)


def _flat(moving: dict[str, Tensor], tensors) -> Tensor:
    return torch.cat([moving.get(n, torch.zeros_like(t)).double().reshape(-1) for n, t in tensors.items()])


def _found(found: Found, state: State) -> Tensor:
    """Scalings without epsilon and shifts, those that leave frozen tensors and statistics alone."""
    velocities = [
        group.velocity(state, rates)
        for group in (found.free, found.translation)
        for rates in torch.eye(group.dimension, dtype=torch.float64)
    ]
    if not velocities:
        return torch.zeros(sum(t.numel() for t in state.parameters.values()), 0, dtype=torch.float64)
    held = {n: t for n, t in {**state.frozen, **state.buffers}.items() if t.is_floating_point()}
    moving = torch.stack([_flat(v, state.parameters) for v in velocities], 1)
    if held:
        moving = moving @ _kernel(torch.stack([_flat(v, held) for v in velocities], 1))
    return moving


def _within(moving: Tensor, directions: Tensor) -> Tensor:
    """Combinations that lie in the span of the directions."""
    if not moving.numel():
        return moving
    basis = _range(directions)
    return moving @ _kernel(moving - basis @ (basis.T @ moving))


def _range(matrix: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(matrix / matrix.norm(dim=0), full_matrices=False)
    return u[:, s > 1e-9 * s[0]]


def _kernel(matrix: Tensor) -> Tensor:
    """Orthonormal columns that a matrix sends to zero, relative to the size of what it was made from."""
    _, s, v = torch.linalg.svd(matrix, full_matrices=True)
    return v[int((s > 1e-9 * max(1.0, float(matrix.abs().max()))).sum()) :].T


def _jacobian(
    found: Found, state: State, inputs: tuple[Tensor, ...], directions: Tensor, together: bool = False
) -> Tensor:
    """J V by forward differentiation; along many directions at once, where every operation can."""
    sizes = [t.numel() for t in state.parameters.values()]

    def output(vector):
        parts = zip(vector.split(sizes), state.parameters.items(), strict=True)
        moved = {name: part.view(tensor.shape) for part, (name, tensor) in parts}
        return found.output(replace(state, parameters=moved), inputs)

    point = _flat(dict(state.parameters), state.parameters)
    if together:
        along = torch.func.vmap(lambda direction: torch.func.jvp(output, (point,), (direction,))[1], chunk_size=64)
        return along(directions.T).T
    columns = [torch.func.jvp(output, (point,), (direction,))[1] for direction in directions.T]
    return torch.stack(columns, 1)
