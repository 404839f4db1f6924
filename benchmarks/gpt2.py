"""GPT-2 small (124 M, random weights from its default configuration): symmetries found, proved and balanced, and one number.

Run with `make bench-gpt2`; prints a Markdown table with seconds and the peak memory of the process so far.
"""

from __future__ import annotations

import os
import resource
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

import isoflat
from isoflat.symmetry.canonical.representative import canonical

T = TypeVar("T")

SEQUENCES, TOKENS = 2, 32


def row(what: str, work: Callable[[], T], note: Callable[[T], str]) -> T:
    """One line of the table."""
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {what} | {seconds:.1f} s | {peak:.2f} GiB | {note(result)} |", flush=True)
    return result


def main() -> None:
    """Print the table."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    tokens = torch.randint(model.config.vocab_size, (SEQUENCES, TOKENS))
    batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores\n")
    print("| step | time | peak memory | result |\n|---|---|---|---|")
    example = {"input_ids": tokens}
    found = row(
        "find",
        lambda: isoflat.symmetries(model, example, verify=False),
        lambda f: (
            f"{f.scaling.dimension} scalings, {f.basis.dimension} changes of basis, "
            f"{f.translation.dimension + f.common.dimension} shifts"
        ),
    )
    row("prove", found.verify, lambda change: f"outputs change by {change:.0e}")
    row(
        "canonical",
        lambda: canonical(found, found.state()),
        lambda p: f"squared norm {sum(float(t.square().sum()) for t in p.state.parameters.values()):.6g}",
    )
    row(
        f"measure, {SEQUENCES} × {TOKENS} tokens",
        lambda: isoflat.measure(model, [batch], rtol=0.05, certify=False, symmetries=found, progress=False),
        lambda e: f"{e}, residual {e.residual / e.value:.1e} of it, {e.cost.products} products",
    )


if __name__ == "__main__":
    main()
