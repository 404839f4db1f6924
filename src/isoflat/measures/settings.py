"""`Settings`: how a measurement is made, as one record that every driver shares and documents once."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypedDict, TypeVar, final

import torch

from isoflat.core.errors import UsageError
from isoflat.risk.linearise import ProductCheck
from isoflat.risk.network import Selector
from isoflat.symmetry.found import Found
from isoflat.symmetry.groups.base import Symmetry


@final
@dataclass(frozen=True)
class Budget:
    """Limits that stop a measurement with a wider interval.

    Attributes:
        products: Hessian-vector products per eigenvalue.
        seconds: wall-clock time per eigenvalue; None for no limit.
        memory: bytes that products may take, beyond weights and the solvers' vectors; None for half of what is free.

    >>> Budget(products=100).seconds is None
    True
    """

    products: int = 300
    seconds: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        """Refuse budgets too small for any answer."""
        if self.products < 2:
            raise UsageError(f"a budget needs at least 2 products (one to look, one to verify), got {self.products}")
        if self.seconds is not None and not self.seconds > 0:
            raise UsageError(f"a budget of seconds must be positive, got {self.seconds}")


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything about a measurement but the network, its data, its loss and the measures.

    Attributes:
        params: the tensors that count: a glob, several, or a predicate of name and tensor; None for all trainable ones.
        symmetries: groups you claim for this network; each is verified on the first batch before anything is measured,
            and a `UnitScale` joins the group of "auto". Or what `isoflat.symmetries` found on this network, for instance
            with rules of your own, or to find once and measure often: it is proved again and used as it is.
        rtol: relative width of the interval to reach.
        confidence: probability that the interval contains the true value; None for 1 − 1e-6 (eigenvalues) and 0.95
            (traces, samples).
        certify: False for a cheaper value with a true residual but without an interval.
        probes: random probes of stochastic estimates.
        sample: "auto" for a sample of the data that is as large as `rtol` needs, examples drawn by how much curvature they
            may carry, with an interval that says what the sample leaves open; all the data is used where that is little
            more, and for numbers without such a form. None for all the data.
        logits: "normalised" for the loss of class scores that are centred and divided by their length, so that growing
            all weights of a network does not make it look flatter; "loss=0.1" for scores multiplied by what brings the
            loss there, so that networks are compared at an equal one; None for the loss as it is.
        initial: weights before training, for bounds whose prior is centred there: a network of the same architecture or
            its state_dict.
        budget: number of products, or a `Budget`; None for the default one.
        seed: seed of the random start vectors and probes.
        dtype: "float32" or "float64"; None for the weights' own. "bfloat16" for products by autocast, with the value from
            a last product in float64, and without a certificate.
        device: device that computes; None for that of the weights.
        progress: whether a progress bar is shown.
        check: products are compared with differences of gradients on a few rows, gradients with differences of losses
            where there are no products; "refuse" raises where they disagree, "warn" notes it beside the number, "skip"
            does not compare.
        reproducible_sum: add the batches' parts in the order of the data, so that every number of processes (of a process
            group of torch.distributed, which is used where there is one) gives the same bits; slower.

    >>> Settings(budget=20).budget.products
    20
    """

    params: Selector = None
    symmetries: Found | Sequence[Symmetry] | None = None
    rtol: float = 1e-3
    confidence: float | None = None
    certify: bool = True
    probes: int = 64
    sample: str | None = None
    logits: str | None = None
    initial: torch.nn.Module | Mapping[str, torch.Tensor] | None = None
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    dtype: torch.dtype | str | None = None
    device: torch.device | str | None = None
    progress: bool = False
    check: ProductCheck = ProductCheck.REFUSE
    reproducible_sum: bool = False

    def __post_init__(self) -> None:
        """Refuse settings without meaning; a number of products becomes a `Budget`, a name of a check that check."""
        given: Any = self.budget
        object.__setattr__(self, "budget", Budget(given) if isinstance(given, int) else given or Budget())
        if self.check not in set(ProductCheck):
            raise UsageError(f"check must be one of {', '.join(ProductCheck)}, got {self.check!r}")
        object.__setattr__(self, "check", ProductCheck(self.check))
        if self.inside is not None and self.certify:
            raise UsageError(
                f"{str(self.inside).removeprefix('torch.')} may be used inside products, but never in a certificate: pass "
                "certify=False, or dtype='float32'"
            )
        if self.sample not in (None, "auto"):
            raise UsageError(f"sample must be 'auto', or None for all the data, got {self.sample!r}")
        if self.sample and not self.certify:
            raise UsageError("sample='auto' gives an interval, which certify=False does without: drop one of the two")
        if not 0 < self.rtol < 1:
            raise UsageError(f"rtol must lie between 0 and 1, got {self.rtol}")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise UsageError(f"confidence must lie strictly between 0 and 1, got {self.confidence}")
        if self.probes < 2:
            raise UsageError(f"a standard error needs at least 2 probes, got {self.probes}")

    @property
    def inside(self) -> torch.dtype | None:
        """Precision that products may use inside, accumulated in float64; never in a certificate."""
        return torch.bfloat16 if self.dtype in (torch.bfloat16, "bfloat16") else None

    def refuse_below_rounding(self, dtype: torch.dtype) -> None:
        """Refuse tolerances below what products can give.

        Args:
            dtype: precision of the products.

        Raises:
            UsageError: `rtol` is smaller than their rounding.
        """
        floor = torch.finfo(self.inside or dtype).eps
        if self.rtol < floor:
            raise UsageError(
                f"rtol={self.rtol:g} lies below the rounding of a product in {self.inside or dtype} ({floor:.1e}): ask for "
                "less, or pass a wider dtype"
            )


class SharedKeywords(TypedDict, total=False):
    """Fields of `Settings` that every driver takes, as keywords for type checkers and editors."""

    params: Selector
    symmetries: Found | Sequence[Symmetry] | None
    logits: str | None
    budget: Budget | int | None
    seed: int
    dtype: torch.dtype | str | None
    device: torch.device | str | None
    progress: bool
    check: ProductCheck | str
    reproducible_sum: bool


class Keywords(SharedKeywords, total=False):
    """All fields of `Settings` as keywords for type checkers and editors; defaults and meaning stand there."""

    rtol: float
    confidence: float | None
    certify: bool
    probes: int
    sample: str | None
    initial: torch.nn.Module | Mapping[str, torch.Tensor] | None


F = TypeVar("F", bound=Callable[..., Any])


def takes_settings(*without: str, **notes: str) -> Callable[[F], F]:
    """A decorator for a function with `**settings: Unpack[Keywords]`: each field becomes a keyword that `help` shows.

    Signature and the docstring's `Args:` get every field of `Settings` with its default and its meaning, in the place of
    `**settings`. An unknown keyword is refused as in any other function.

    Args:
        *without: fields that this function does not take.
        **notes: the meaning of a field for this function, in the place of that in `Settings`.

    >>> @takes_settings("sample", seed="seed of this example")
    ... def example(model, **settings):
    ...     '''An example.
    ...
    ...     Args:
    ...         model: a network.
    ...         **settings: as below.
    ...     '''
    >>> inspect.signature(example).parameters["rtol"].default
    0.001
    >>> "seed: seed of this example" in example.__doc__, "sample:" in example.__doc__
    (True, False)
    """

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        given = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {p.name for p in given} | set(without)
        shown = [f for f in fields(Settings) if f.name not in taken]
        keywords = [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f), annotation=_annotation(f.name)
            )
            for f in shown
        ]
        signature = own.replace(parameters=[*given, *keywords])

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            signature.bind(*args, **kwargs)  # an unknown or a missing argument is named here
            return function(*args, **kwargs)

        call.__signature__ = signature  # pyrefly: ignore
        call.__doc__ = _documented(function.__doc__ or "", [f.name for f in shown], notes)
        return call  # pyrefly: ignore

    return decorate


def _default(item: Any) -> Any:
    """The default of a field as a user would write it: None where one is made."""
    if item.default is MISSING:
        return None
    return str(item.default) if isinstance(item.default, ProductCheck) else item.default


def _annotation(name: str) -> Any:
    """The annotation of a keyword."""
    found = {**SharedKeywords.__annotations__, **Keywords.__annotations__}[name]
    return getattr(found, "__forward_arg__", found)


def _documented(text: str, names: Sequence[str], notes: Mapping[str, str]) -> str:
    """A docstring with the meaning of each keyword in the place of the line about `**settings`."""
    meanings = _meanings()
    said = [f"{name}: {notes[name]}" if name in notes else meanings[name] for name in names]
    return re.sub(
        r"^( *)\*\*settings:.*\n(?:\1 +.*\n)*",
        lambda found: "".join(f"{found[1]}{line}\n" for entry in said for line in entry.splitlines()),
        text,
        flags=re.MULTILINE,
    )


@functools.cache
def _meanings() -> dict[str, str]:
    """Meaning of each field from the docstring of `Settings`, continuation lines indented by four."""
    listed = inspect.cleandoc(Settings.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^ {4}(?=\w+:)", listed, flags=re.MULTILINE)
    return {
        entry.partition(":")[0]: "\n".join(line.removeprefix("    ") for line in entry.rstrip().splitlines())
        for entry in entries
        if entry.strip()
    }
