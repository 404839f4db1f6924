"""Workers of a sweep on a cluster: each runs the same command on the same store, and takes what no other is at."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from isoflat.core.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from isoflat.experiments.recipe import Recipe

CLUSTERS = ("slurm", "local")
"""Where submitit can run workers."""

HOURS = 24
"""That a worker may take; what it has not done by then, the next one does."""


def check(cluster: str) -> None:
    """Refuse what cannot be submitted to, before anything is written.

    Raises:
        UnknownName: no such cluster.
        UsageError: submitit is not installed.
    """
    if cluster not in CLUSTERS:
        raise UnknownName("cluster", cluster, CLUSTERS)
    if find_spec("submitit") is None:
        raise UsageError("--submit needs submitit: pip install 'isoflat[slurm]'")


def submitted(cluster: str, recipe: Recipe, source: str | None, folder: Path, workers: int, device: str | None) -> None:
    """Run workers, and wait for all of them.

    Slurm's own settings (partition, account, memory) are taken from its environment variables, such as SBATCH_PARTITION.

    Args:
        cluster: "slurm", or "local" for processes of this machine; it has been checked.
        recipe: whose networks are to be made.
        source: of the data.
        folder: that all of them see; logs go to its `jobs`.
        workers: how many.
        device: where networks live.

    Raises:
        UsageError: there is no Slurm.
    """
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=cluster)
    except RuntimeError as error:
        raise UsageError(f"--submit {cluster}: {error}") from error
    gpus = 1 if device is not None and device.startswith("cuda") else 0
    executor.update_parameters(
        name=f"isoflat-{recipe.name}", timeout_min=60 * HOURS, cpus_per_task=1, gpus_per_node=gpus
    )
    with executor.batch():
        jobs = [executor.submit(work, recipe, source, folder.absolute(), device) for _ in range(workers)]
    for job in jobs:
        job.result()


def work(recipe: Recipe, source: str | None, folder: Path, device: str | None) -> int:
    """One worker: every network that no other is at; how many there are at the end."""
    from isoflat.cli.reproduce import followed

    return len(followed(recipe, source, folder, jobs=1, device=device).networks)
