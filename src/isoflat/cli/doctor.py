"""`isoflat doctor`: what is installed, and whether a network can be measured."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from isoflat.cli.deliver import deliver
from isoflat.cli.exits import REFUSED
from isoflat.cli.options import ComputeOptions, NetworkOptions, OutputOptions, takes
from isoflat.cli.terminal import entry
from isoflat.core.errors import UsageError
from isoflat.core.fitted import literal
from isoflat.core.render import WIDTH

if TYPE_CHECKING:
    from isoflat.cli.examine import Finding

EXTRAS = {
    "pyarrow": "images",
    "PIL": "images",
    "torchvision": None,
    "timm": None,
    "transformers": None,
    "lightning": None,
}
"""Optional packages, each with the extra of isoflat that installs it, if any."""

FRAGILE = ("torchvision", "timm")
"""Packages that are often installed but broken, so that they are imported once, in a process of their own."""

_COLOURS = {"ok": "green", "fail": "bold red", "skipped": "dim"}


@takes(NetworkOptions, "network", model=None, data=None)
@takes(ComputeOptions, "compute", only=("seed", "dtype", "device"))
@takes(OutputOptions, "output", only=("as_json",))
def doctor(network: NetworkOptions, compute: ComputeOptions, output: OutputOptions) -> None:
    """Tell versions and devices; with --model and --data, check everything a measurement relies on.

    Exit code 0: all checks passed. 2: a check failed, and its line says what to do.
    """
    if (network.model is None) != (network.data is None):
        raise UsageError("to check a network, give both --model and --data (for instance --data digits)")
    checks: tuple[Finding, ...] = ()
    if network.model is not None:
        from isoflat.cli.examine import examine
        from isoflat.io.inputs import device_of

        checks = examine(network.inputs(compute.seed), compute.dtype, device_of(compute.device))
    found = surroundings()
    good = all(check.outcome == "ok" for check in checks)
    report = {**found, "checks": [asdict(check) for check in checks], "ok": good}
    deliver(report, lambda screen: _show(screen, found, checks), output.as_json)
    if not good:
        raise typer.Exit(REFUSED)


def surroundings() -> dict[str, Any]:
    """Versions, devices, memory and optional packages."""
    import psutil
    import torch

    devices = ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))]
    return {
        "versions": {
            "python": platform.python_version(),
            **{
                name: metadata.version(name)
                for name in ("isoflat", "torch", "numpy", "scipy", "scikit-learn", "safetensors")
            },
        },
        "devices": devices,
        "threads": torch.get_num_threads(),
        "memory_available": psutil.virtual_memory().available,
        "memory_total": psutil.virtual_memory().total,
        "extras": {name: extra(name) for name in EXTRAS},
    }


def extra(name: str) -> str:
    """State of an optional package: "works", "found", "missing", or why it is broken.

    Nothing fragile is imported here: a broken installation may take the whole process down.
    """
    if importlib.util.find_spec(name) is None:
        return "missing"
    if name not in FRAGILE:
        return "found"
    code = f"import sys; sys.path[:] = {sys.path!r}; import {name}"
    try:
        tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"broken: {type(error).__name__}"
    if tried.returncode == 0:
        return "works"
    lines = tried.stderr.strip().splitlines()
    return f"broken: {lines[-1][:160] if lines else f'exit code {tried.returncode}'}"


def _show(screen: Console, found: dict[str, Any], checks: tuple[Finding, ...]) -> None:
    for name, version in found["versions"].items():
        screen.print(literal(f"{name:<14}{version}"))
    screen.print(literal(f"{'devices':<14}{', '.join(found['devices'])}; {found['threads']} threads"))
    free, total = found["memory_available"] / 2**30, found["memory_total"] / 2**30
    screen.print(literal(f"{'memory':<14}{free:.1f} GiB free of {total:.1f} GiB"))
    for name, state in found["extras"].items():
        hint = f": pip install 'isoflat[{EXTRAS[name]}]'" if state == "missing" and EXTRAS[name] else ""
        screen.print(
            literal(f"{name:<14}{state}{hint}", style="" if state in ("works", "found") else "dim"),
            soft_wrap=screen.width >= WIDTH,
        )
    for check in checks:
        entry(screen, check.outcome, f"{check.name}: {check.detail}", 8, _COLOURS[check.outcome])
