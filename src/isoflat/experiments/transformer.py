"""The demonstration on a transformer: are large-step minima flatter, and which number can be trusted to say so?

Everything here is a pure function of its arguments; nothing is printed or written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from isoflat.core.errors import UsageError
from isoflat.experiments.data import Split
from isoflat.experiments.demonstration import DemoArm, DemoNetwork, DemoResult, DemoSetting, train_arms
from isoflat.experiments.families import decoder
from isoflat.experiments.ladders import Victim, reparametrize_all
from isoflat.experiments.loop import one_thread
from isoflat.experiments.numbers import CANONICAL, PAPER
from isoflat.experiments.progress import Report, silent


@final
@dataclass(frozen=True)
class TransformerPlan:
    """Settings of the demonstration on a transformer.

    Attributes:
        seeds: number of networks per arm.
        seed: seed of all random numbers.
        optimizer: name of the optimizer; only Adam's learning rates are compared.
        target: training loss at which networks are compared.
        rates: the two learning rates, the smaller one first.
        batch: number of windows per step.
        windows: number of windows that are trained and measured on.
        context: number of characters in a window.
        width: width of the transformer's residual stream.
        heads: number of heads of each attention.
        layers: number of blocks.
        spreads: standard deviations of the logarithms of the factors by which the attacks reparametrise, growing from
            zero; see `ladders.reparametrize_all`.
        max_epochs: epochs after which a training stops anyway, as in `Regime`.
    """

    seeds: int = 5
    seed: int = 0
    optimizer: str = "adam"
    target: float = 0.2
    rates: tuple[float, float] = (0.001, 0.01)
    batch: int = 16
    windows: int = 48
    context: int = 32
    width: int = 32
    heads: int = 4
    layers: int = 2
    spreads: tuple[float, ...] = (0.0, 1.0, 3.0)
    max_epochs: int = 2000

    def __post_init__(self) -> None:
        """Refuse comparisons without meaning."""
        if self.seeds < 2:
            raise UsageError(f"a comparison needs at least 2 seeds per arm, got {self.seeds}")
        if self.optimizer != "adam":
            raise UsageError(
                f"the transformer's two learning rates are Adam's, got the optimizer {self.optimizer!r}: leave it out, "
                "or take the other network"
            )
        if not 0 < self.rates[0] < self.rates[1]:
            raise UsageError(f"expected two positive learning rates, the smaller one first, got {self.rates}")
        if len(self.spreads) < 2 or self.spreads[0] != 0 or list(self.spreads) != sorted(set(self.spreads)):
            raise UsageError(f"spreads must grow from zero, got {self.spreads}")

    @property
    def work(self) -> float:
        """Units of work of the whole demonstration, as reported on the way."""
        return 2.0 * 2 * self.seeds + 2 * len(self.spreads)

    @property
    def setting(self) -> DemoSetting:
        """Properties of this demonstration: architecture, arms, question and sentences."""
        first, second = self.rates
        return DemoSetting(
            network=f"{self.layers} causal pre-norm blocks of width {self.width} with {self.heads} heads, ReLU, "
            f"{self.context} characters of context",
            arms=(DemoArm("small step", self.batch, first), DemoArm("large step", self.batch, second)),
            question="Are large-step minima flatter?",
            fooled=PAPER,
            passing="By the paper's number the reparametrised {label} would pass for {times} times sharper than the "
            "sharpest {other} network, although it computes the same function as before; by the canonical number it is "
            "{still} than that one.",
            together=True,
        )


def run_transformer(data: Split, plan: TransformerPlan, report: Report = silent) -> DemoResult:
    """Train, measure and compare transformers; attack the flattest network, and the sharpest one of the other arm.

    Args:
        data: windows of characters.
        plan: settings of the demonstration.
        report: function that is told what is going on.
    """
    started = time.monotonic()
    setting = plan.setting

    def build(seed: int) -> decoder.Decoder:
        return decoder.build(len(data.vocabulary), plan.context, plan.width, plan.heads, plan.layers, seed)

    with one_thread():
        networks = train_arms(data, plan, setting.arms, build, report)
        ladders = []
        for network in extremes(networks):
            victim = Victim.prepare(network.model, data.train, network.label, aside=True)
            ladders.append(reparametrize_all(victim, plan.spreads, plan.seed, report))
    return DemoResult(setting, plan, data.name, networks, tuple(ladders), time.monotonic() - started)


def extremes(networks: Sequence[DemoNetwork]) -> tuple[DemoNetwork, DemoNetwork]:
    """The flattest network by the canonical number, and the sharpest one of the other arm.

    Args:
        networks: the networks of both arms.
    """

    def sharpness(network: DemoNetwork) -> float:
        return network.estimate(CANONICAL).value

    flat = min(networks, key=sharpness)
    return flat, max((network for network in networks if network.arm != flat.arm), key=sharpness)
