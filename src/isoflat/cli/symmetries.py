"""`isoflat symmetries`: finds the changes of the weights that keep the function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from isoflat.cli.deliver import deliver
from isoflat.cli.options import ComputeOptions, NetworkOptions, OutputOptions, takes
from isoflat.cli.terminal import entry
from isoflat.core.fitted import literal
from isoflat.core.render import leading

if TYPE_CHECKING:
    from isoflat.symmetry.found import Found
    from isoflat.symmetry.report import SymmetryLine

NOT_CLAIMED = "not claimed"

KINDS = ("scale", "scale divided out", "basis", "rotation", "shift", "common vector", "common vector read")
"""Kinds of groups in the order in which they are printed; those of later rules come after them, and what is not claimed last."""

LISTED = 8
"""Tensors that one line names."""


@takes(NetworkOptions, "network")
@takes(ComputeOptions, "compute", only=("seed",))
@takes(OutputOptions, "output", only=("as_json",))
def symmetries(network: NetworkOptions, compute: ComputeOptions, output: OutputOptions) -> None:
    """Find changes of the weights that keep the function (scales, shifts, bases), and prove them on the network.

    "Common vector": one vector added to all rows of a weight, because readers subtract their mean; "read": to every
    row a multiple of one vector, because the LayerNorm that it reads never gives that direction. "Basis": what writes
    some coordinates is multiplied by an invertible matrix and what reads them by its inverse; "rotation": by a rotation.

    The network is traced on the first rows of the data; the loss tells whether a constant added to all scores counts.
    Exit code 0: found and proved. 2: refused, with the reason.
    """
    from isoflat.io.inputs import prepare
    from isoflat.io.symmetries import described
    from isoflat.measurement.groups import symmetries_of

    inputs = network.inputs(compute.seed)
    loaded, target = prepare(inputs)
    found = symmetries_of(target)
    content = {
        "subject": inputs.described() | {"notes": list(loaded.notes)},
        **described(found, found.verify(seed=compute.seed)),
    }
    deliver(content, lambda screen: show(screen, inputs.model, found, content), output.as_json)


def show(screen: Console, name: str, found: Found, content: dict[str, Any]) -> None:
    """The groups as a tree, then what is known about them all."""
    exact, free = content["dimension"]["exact"], content["dimension"]["without_epsilon"]
    verb = "dimension keeps" if exact == 1 else "dimensions keep"
    tree = Tree(literal(f"{name}: {exact} {verb} the function", style="bold"), guide_style="dim")
    width = max((len(str(line.dimension)) for line in found.report), default=0)
    kinds = dict.fromkeys((*KINDS, *(line.kind for line in found.report if line.kind != NOT_CLAIMED), NOT_CLAIMED))
    for kind in kinds:
        lines = [line for line in found.report if line.kind == kind]
        if lines:
            total = sum(line.dimension for line in lines)
            branch = tree.add(literal(f"{kind}: {total}{' units' if kind == NOT_CLAIMED else ''}"))
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
        entry(screen, head, text, 10)


def _line(line: SymmetryLine, width: int) -> Text:
    """One group in words: dimensions, tensors, and reasons against those that are fixed."""
    text = literal(f"{line.dimension:>{width}}  {leading(line.tensors, LISTED)}")
    return text + literal(f"; fixed by {', '.join(line.reasons)}", style="yellow") if line.reasons else text
