"""`isoflat canonicalize`: the weights that every copy of a network leads back to, up to rotations and order of units."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.options import ComputeOptions, NetworkOptions, OutputOptions, takes
from isoflat.cli.save import claim, save
from isoflat.cli.terminal import WIDTH, console, notes, plain
from isoflat.core.errors import UsageError
from isoflat.core.render import some

if TYPE_CHECKING:
    from torch import Tensor, nn

    from isoflat.io.inputs import Loaded
    from isoflat.symmetry.canonical.representative import Epsilon
    from isoflat.symmetry.found import Found


@takes(NetworkOptions, "network")
@takes(ComputeOptions, "compute", only=("seed",))
@takes(OutputOptions, "output", only=("force", "as_json"))
def canonicalize(
    network: NetworkOptions,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The .safetensors file to write.", rich_help_panel=options.OUT)
    ],
    fixed_epsilon: Annotated[
        bool,
        typer.Option(
            "--fixed-epsilon",
            help="Leave the epsilons of normalisations as they are, so that the file is complete in itself.",
            rich_help_panel=options.OUT,
        ),
    ] = False,
    *,
    compute: ComputeOptions,
    output: OutputOptions,
) -> None:
    """Write the canonical weights: the same function, and the same numbers for every rescaled or shifted copy of it.

    Copies in another basis give the same up to rotations of pairs of linear maps and of streams.

    Exit code 0: written. 2: refused, with the reason; nothing is written.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: expected a name that ends in .safetensors")
    claim(out, output.force)
    from isoflat.io.inputs import prepare
    from isoflat.measurement.prepare import symmetries_of
    from isoflat.symmetry.canonical.representative import Epsilon

    inputs = network.inputs(compute.seed)
    loaded, target = prepare(inputs)
    facts, content = convert(loaded, symmetries_of(target), Epsilon.FIXED if fixed_epsilon else Epsilon.MOVED)
    save(out, content, output.force)
    if output.as_json:
        described = {"subject": inputs.described() | {"notes": list(loaded.notes)}, "out": str(out), **facts}
        sys.stdout.write(json.dumps(described, allow_nan=False) + "\n")
    else:
        show(console(), out, facts, loaded.notes)


def convert(loaded: Loaded, found: Found, epsilon: Epsilon) -> tuple[dict[str, Any], bytes]:
    """The canonical weights as a file, and what to know about it.

    Args:
        loaded: the network and the data.
        found: its symmetries.
        epsilon: what becomes of the epsilons of normalisations.

    Raises:
        SymmetryViolated: the canonical network's outputs are not the given one's.
    """
    import copy

    from safetensors.torch import save as pack

    from isoflat.core.errors import SymmetryViolated
    from isoflat.symmetry.canonical.representative import canonical, install
    from isoflat.symmetry.found import TOLERANCE, VERSION

    model = loaded.model
    state = canonical(found, found.state(model), epsilon).state
    precise = copy.deepcopy(model).double()
    moved, rounded = install(precise, state), install(model, state)
    change = _change(found, model, moved)
    if not change <= TOLERANCE:
        raise SymmetryViolated(
            f"the canonical weights change the network's outputs by {change:.1e} of the largest (allowed: {TOLERANCE:g}), "
            "so that nothing was written. Are the given weights too badly scaled for float64, or is a rule wrong?"
        )
    before, after = found.constants(model), found.constants(rounded)
    epsilons = {path: {"before": before[path], "after": after[path]} for path in before if after[path] != before[path]}
    tensors = _tensors(rounded)
    held, touched = set(model.state_dict()), frozenset[str]().union(*(group.touches for group in found.symmetries))
    if lost := [name for name, _ in model.named_buffers() if name in touched and name not in held]:
        raise UsageError(
            f"buffers that no weights file holds would have to change ({some(lost)}): register them with persistent=True"
        )
    labels = {
        "format": "pt",
        "isoflat": metadata.version("isoflat"),
        "group_hash": found.hash,
        "rules": str(VERSION),
        "epsilons": json.dumps({path: value["after"] for path, value in epsilons.items()}),
    }
    facts = {
        "tensors": len(tensors),
        "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "group_hash": found.hash,
        "rules": VERSION,
        "fixed_epsilon": epsilon == "fixed",
        "epsilons": epsilons,
        "loss_ignores_common_score": found.blind,
        "output_change": change,
        "rounding_change": _change(found, model, rounded),
        "loss": {"before": _loss(loaded, precise), "after": _loss(loaded, moved)},
    }
    return facts, pack(tensors, labels)


def show(screen: Console, out: Path, facts: dict[str, Any], loading: tuple[str, ...]) -> None:
    """What was written, how well it was checked, and what else belongs to it."""
    before, after, blind = *facts["loss"].values(), facts["loss_ignores_common_score"]
    lines = [
        ("written", f"{out}: {facts['tensors']} tensors in {', '.join(facts['dtype'])}"),
        (
            "outputs",
            f"changed by {facts['output_change']:.0e} of the largest in float64; by {facts['rounding_change']:.0e} "
            f"as written, from rounding{'; a constant on all scores, which the loss ignores, aside' if blind else ''}",
        ),
        ("loss", f"{before:.9g} before, {after:.9g} after"),
        ("group", f"{facts['group_hash']}, rules {facts['rules']}"),
    ]
    for head, text in lines:
        screen.print(plain(f"{head:<9}", style="dim") + plain(text), soft_wrap=screen.width >= WIDTH)
    if facts["epsilons"]:
        screen.print(
            plain(
                "The file is the same function only with these attributes of the network's modules. They are in its "
                "metadata, and isoflat sets them; elsewhere set them yourself, or write a file with --fixed-epsilon:",
                style="bold",
            )
        )
        for path, value in facts["epsilons"].items():
            screen.print(
                plain(f"  {path} = {value['after']!r}  (was {value['before']!r})"), soft_wrap=screen.width >= WIDTH
            )
    notes(screen, loading)


def _change(found: Found, model: nn.Module, other: nn.Module) -> float:
    """Largest change of an output in float64, relative to the largest output."""
    import torch

    one, two = (found.output(found.state(module).to(dtype=torch.float64)) for module in (model, other))
    return float((two - one).abs().max()) / (float(one.abs().max()) or 1.0)


def _loss(loaded: Loaded, model: nn.Module) -> float:
    """On all the data, in float64."""
    from isoflat.measurement.prepare import subject
    from isoflat.risk.network import exactly

    target = subject(model, loaded.batches, loaded.loss)
    with exactly(target.state.device):
        return target.risk.value(target.state)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a weights file holds: each tensor under its first name only."""
    from torch import Tensor

    kept: dict[tuple[Any, ...], str] = {}
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        kept.setdefault(place, name)
    return {name: state[name].detach().cpu().clone().contiguous() for name in kept.values()}
