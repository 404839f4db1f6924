"""`isoflat symmetries`: which changes of the weights keep the function?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from isoflat.cli import options
from isoflat.cli.save import deliver
from isoflat.cli.terminal import plain

if TYPE_CHECKING:
    from isoflat.symmetry.found import Found
    from isoflat.symmetry.report import SymmetryLine

NOT_CLAIMED = "not claimed"

KINDS = ("scale", "scale divided out", "basis", "rotation", "shift", "common vector", "common vector read")
"""In the order in which they are printed; kinds of later rules come after them, and what is not claimed last."""

LISTED = 8
"""Tensors that one line names."""


def symmetries(  # noqa: PLR0913
    model: options.Model,
    data: options.Data,
    weights: options.Weights = None,
    loss: options.Loss = "cross_entropy",
    weights_key: options.WeightsKey = None,
    strip_prefix: options.StripPrefix = None,
    transform: options.Transform = None,
    split: options.Split = None,
    examples: options.Examples = None,
    batch_size: options.BatchSize = 500,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Find changes of the weights that keep the function (scales, shifts, bases), and prove them on the network.

    "Common vector": one vector added to all rows of a weight, because readers subtract their mean; "read": to every
    row a multiple of one vector, because the LayerNorm that it reads never gives that direction. "Basis": what writes
    some coordinates is multiplied by an invertible matrix and what reads them by its inverse; "rotation": by a rotation.

    The network is traced on the first rows of the data; the loss tells whether a constant added to all scores counts.
    Exit code 0: found and proved. 2: refused, with the reason.
    """
    from isoflat.io.inputs import Inputs, prepare
    from isoflat.measurement.prepare import symmetries_of

    inputs = Inputs(
        model=model,
        data=data,
        weights=weights,
        weights_key=weights_key,
        strip_prefix=tuple(strip_prefix or ()),
        split=split,
        transform=transform,
        examples=examples,
        batch_size=batch_size,
        loss=loss,
        seed=seed,
    )
    loaded, target = prepare(inputs)
    found = symmetries_of(target)
    content = {
        "subject": inputs.described() | {"notes": list(loaded.notes)},
        **described(found, found.verify(seed=seed)),
    }
    deliver(content, lambda screen: show(screen, model, found, content), as_json)


def described(found: Found, verified: float) -> dict[str, Any]:
    """Everything that was found, as plain values.

    Args:
        found: the symmetries.
        verified: largest relative change of an output that a random element made.
    """
    from isoflat.symmetry.found import VERSION

    claimed = [line for line in found.report if line.kind != NOT_CLAIMED]
    shifts = found.translation.dimension + found.common.dimension
    return {
        "dimension": {
            "exact": found.dimension,
            "without_epsilon": found.free.dimension + found.basis.dimension + shifts,
        },
        "groups": [{"kind": line.kind, "dimension": line.dimension, "tensors": list(line.tensors)} for line in claimed],
        "not_claimed": [
            {"units": line.dimension, "tensors": list(line.tensors), "reasons": list(line.reasons)}
            for line in found.report
            if line.kind == NOT_CLAIMED
        ],
        "epsilons": found.constants(found.model),
        "loss_ignores_common_score": found.blind,
        "verified": verified,
        "group_hash": found.hash,
        "rules": VERSION,
    }


def show(screen: Console, name: str, found: Found, content: dict[str, Any]) -> None:
    """The groups as a tree, then what is known about them all."""
    exact, free = content["dimension"]["exact"], content["dimension"]["without_epsilon"]
    verb = "dimension keeps" if exact == 1 else "dimensions keep"
    tree = Tree(plain(f"{name}: {exact} {verb} the function", style="bold"), guide_style="dim")
    width = max((len(str(line.dimension)) for line in found.report), default=0)
    kinds = dict.fromkeys((*KINDS, *(line.kind for line in found.report if line.kind != NOT_CLAIMED), NOT_CLAIMED))
    for kind in kinds:
        lines = [line for line in found.report if line.kind == kind]
        if lines:
            total = sum(line.dimension for line in lines)
            branch = tree.add(plain(f"{kind}: {total}{' units' if kind == NOT_CLAIMED else ''}"))
            for line in lines:
                branch.add(_line(line, width))
    screen.print(tree)
    facts = [
        ("proved", f"random elements changed outputs by at most {content['verified']:.0e} of the largest, float64")
    ]
    if free != exact:
        facts.append(
            (
                "epsilons",
                f"count as zero in these lines ({free} dimensions); as the modules hold them, {exact} are exact",
            )
        )
    if found.blind:
        facts.append(("loss", "ignores a constant added to all scores of an example"))
    facts.append(("group", f"{content['group_hash']}, rules {content['rules']}"))
    for head, text in facts:
        screen.print(plain(f"{head:<10}", style="dim") + plain(text), soft_wrap=True)


def _line(line: SymmetryLine, width: int) -> Text:
    """How many, of what, and why not."""
    more = f" and {len(line.tensors) - LISTED} more" if len(line.tensors) > LISTED else ""
    text = plain(f"{line.dimension:>{width}}  {', '.join(line.tensors[:LISTED])}{more}")
    return text + plain(f"; fixed by {', '.join(line.reasons)}", style="yellow") if line.reasons else text
