"""The demonstration: are large-batch minima sharper, and which number can be trusted to say so?

Nothing is printed or written, but for a line of progress where it is asked for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import final

from torch import nn

from isoflat.core.errors import UsageError
from isoflat.core.rng import stream
from isoflat.experiments import transformer
from isoflat.experiments.data import Split, characters, digits
from isoflat.experiments.demonstration import DemoArm, DemoResult, DemoSetting, train_arms
from isoflat.experiments.families import mlp, normed
from isoflat.experiments.ladders import Victim, rescale_layers, rescale_units, shift_constants
from isoflat.experiments.loop import Regime, one_thread, train
from isoflat.experiments.numbers import PLAIN
from isoflat.experiments.progress import Report, bar, silent

SMALL, LARGE = DemoArm("small batch", 16), DemoArm("large batch", None)


@final
@dataclass(frozen=True)
class MlpPlan:
    """Settings of the demonstration on digits.

    Attributes:
        seeds: number of networks per arm.
        seed: seed of all random numbers.
        optimizer: name of the optimizer, as in `Regime`.
        target: training loss at which networks are compared.
        widths: widths of the fully connected network's layers, the input first; it has no biases.
        factors: factors by which the two rescaling attacks multiply; the first, 1, changes nothing.
        shifts: constants that the last attack adds to biases; the first, 0, changes nothing.
        max_epochs: epochs after which a training stops anyway, as in `Regime`.
    """

    seeds: int = 5
    seed: int = 0
    optimizer: str = "adam"
    target: float = 0.01
    widths: tuple[int, ...] = (64, 128, 128, 128, 10)
    factors: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    shifts: tuple[float, ...] = (0.0, 10.0, 100.0, 1000.0)
    max_epochs: int = 4000

    def __post_init__(self) -> None:
        """Refuse too few networks for any comparison."""
        if self.seeds < 2:
            raise UsageError(f"a comparison needs at least 2 seeds per arm, got {self.seeds}")
        if len(self.widths) < 4:
            raise UsageError(f"the attack on single units needs two hidden layers or more, got {self.widths}")

    @property
    def work(self) -> float:
        """Units of work of the whole demonstration, as reported on the way."""
        return 2.0 * 2 * self.seeds + 2 + len(self.factors) * 2 + len(self.shifts)

    @property
    def setting(self) -> DemoSetting:
        """Properties of this demonstration: architecture, arms, question and sentences."""
        return DemoSetting(
            network=f"{'–'.join(map(str, self.widths))}, ReLU, no biases",
            arms=(SMALL, LARGE),
            question="Are large-batch minima sharper?",
            fooled=PLAIN,
            passing="By the plain number the rescaled {label} would pass for {times} times sharper than the sharpest "
            "{other} network, although it computes the same function as before.",
            leading=1,
        )


def demonstrate(plan: MlpPlan | transformer.TransformerPlan, progress: bool = False) -> DemoResult:
    """Run a demonstration on data that comes with isoflat or with Python.

    Args:
        plan: settings of one of the two demonstrations.
        progress: whether a line of progress is shown on the standard error.
    """
    with bar(plan.work, not progress) as report:
        if isinstance(plan, transformer.TransformerPlan):
            return transformer.run_transformer(characters(plan.windows, plan.context), plan, report)
        return run_mlp(digits(), plan, report)


def run_mlp(data: Split, plan: MlpPlan, report: Report = silent) -> DemoResult:
    """Train and measure the networks of both arms on digits, compare them, and attack one of them and a normalised one.

    Args:
        data: rows to train on, and rows that are held out.
        plan: settings of the demonstration.
        report: function that is told what is going on.
    """
    started = time.monotonic()
    setting = plan.setting
    with one_thread():
        networks = train_arms(
            data, plan, setting.arms, lambda seed: mlp.build(plan.widths, bias=False, seed=seed), report
        )
        victim = Victim.prepare(networks[0].model, data.train, networks[0].label)
        ladders = [climb(victim, plan.factors, plan.seed, report) for climb in (rescale_layers, rescale_units)]
        model = _normed(data, plan, report)
        other = Victim.prepare(model, data.train, "batch-normalised")
        ladders.append(shift_constants(other, normed.pairs(model), plan.shifts, plan.seed, report))
    return DemoResult(setting, plan, data.name, networks, tuple(ladders), time.monotonic() - started)


def _normed(data: Split, plan: MlpPlan, report: Report) -> nn.Sequential:
    """A smaller network with biases and batch normalisation, trained with small batches to the same loss."""
    report("training batch-normalised", 0.0)
    model = normed.build((plan.widths[0], *plan.widths[2:]), seed=stream(plan.seed, "normed").initial_seed())
    regime = Regime(SMALL.batch, plan.target, plan.optimizer, plan.max_epochs)
    train(model, data.train, regime, stream(plan.seed, "order", "normed"))
    report("trained batch-normalised", 2.0)
    return model
