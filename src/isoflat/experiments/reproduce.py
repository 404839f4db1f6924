"""Experiments of the literature: every network of a recipe trained and measured, here or by workers of a cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from isoflat.core.errors import UnknownName, UsageError
from isoflat.experiments.cells import decided
from isoflat.experiments.data import load_split
from isoflat.experiments.progress import bar
from isoflat.experiments.recipe import Recipe, read_recipe
from isoflat.experiments.reproduction import Reproduction
from isoflat.experiments.store import Store
from isoflat.experiments.sweep import check_recipe, sweep, tasks
from isoflat.io.files import make_folder
from isoflat.io.inputs import device_of
from isoflat.measures.catalogue import find_geometry, find_measure
from isoflat.risk.ranks import Ranks

CLUSTERS = ("slurm", "local")
"""Places where submitit can run workers."""

HOURS = 24
"""Hours that a worker may take; the same call later does what it has not done by then."""


def reproduce(  # noqa: PLR0913
    recipe: str | Recipe,
    data: str | None = None,
    *,
    out: Path | str | None = None,
    scale: str = "small",
    replicates: int | None = None,
    measures: Sequence[str] | None = None,
    geometry: Sequence[str] | None = None,
    orbit: int | None = None,
    seed: int | None = None,
    jobs: int | None = None,
    device: str | None = None,
    submit: str | None = None,
    progress: bool = False,
) -> Reproduction:
    """Train, measure and compare the networks of an experiment, as `isoflat reproduce` does.

    Every network is kept in the store of the folder as soon as it is there: the same call goes on where another was
    stopped, and calls of several machines that share the folder help each other. In a process group of
    `torch.distributed` all processes share each network's measurement.

    Args:
        recipe: name of a recipe of the package (`isoflat.experiments.recipe.recipes()`); or a recipe that was read already,
            which is followed as it is, whatever `scale`, `replicates`, `measures`, `geometry`, `orbit` and `seed` say.
        data: path of the recipe's data, where it does not come with isoflat.
        out: folder for the store; None for `isoflat-NAME`.
        scale: "small", or "paper" for the experiment as it was published.
        replicates: number of networks per arm; None for the recipe's.
        measures: names in the catalogue, instead of the recipe's numbers.
        geometry: names of metrics, with `measures`; None for "auto".
        orbit: number of random points of each network's orbit; None for the recipe's.
        seed: seed of all random numbers; None for the recipe's.
        jobs: number of processes; None for one for each core, and one on an accelerator.
        device: device of the networks; None for the CPU.
        submit: "slurm" or "local", where submitit is to run `jobs` workers.
        progress: whether a line of progress is shown on the standard error.

    Returns:
        The findings, as numbers and in sentences.

    Raises:
        IsoflatError: something is refused; what would be refused of all networks alike, before any is trained.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = reproduce(
    ...         "synthetic-invariance",
    ...         out=folder,
    ...         replicates=1,
    ...         measures=["gradient_norm"],
    ...         geometry=["layerwise"],
    ...         jobs=1,
    ...     )
    >>> [(network.label, len(network.table)) for network in found.networks]
    [('as initialised 0', 1)]
    """
    started, ranks = time.monotonic(), Ranks.here()
    if isinstance(recipe, str):
        changes = {"replicates": replicates, "orbit": orbit, "seed": seed, "numbers": _numbers(measures, geometry)}
        recipe = read_recipe(recipe, scale, **changes)
    folder = Path(f"isoflat-{recipe.name}" if out is None else out)
    if ranks.world > 1 and ((jobs or 1) > 1 or submit is not None):
        raise UsageError("under torchrun all processes are at the same network: leave out --jobs and --submit")
    if submit is not None:
        _check_cluster(submit)
    place = device_of(device) or torch.device("cpu")
    with ranks.agreeing() as facts:
        split = load_split(recipe.data, data).to(place)
        facts["data"] = split.hash
    numbers = tuple(quantity.number for quantity in recipe.numbers)
    with ranks.agreeing():
        check_recipe(recipe, split, numbers)
    with ranks.agreeing():
        if ranks.first:
            make_folder(folder)  # what is refused leaves no folder behind
    store, todo = decided(ranks, lambda: Store.open(folder / "store")), tasks(recipe)
    alone = place.type == "cpu" and ranks.world == 1
    workers = jobs or (min(len(todo), os.cpu_count() or 1) if alone else 1)
    if submit is not None:
        submitted(submit, recipe, data, folder, workers, device)
        workers = 1
    with bar(len(todo), not (progress and ranks.first)) as report:
        networks = sweep(todo, split, numbers, store, report, workers)
    return Reproduction(recipe, split.name, numbers, networks, time.monotonic() - started)


def _numbers(names: Sequence[str] | None, places: Sequence[str] | None) -> list[dict[str, str]] | None:
    """Numbers that are measured instead of the recipe's; None for the recipe's."""
    if not names:
        if places:
            raise UsageError("--geometry says where --measure is measured: name measures too")
        return None
    made = []
    for name in names:
        single = find_measure(name).geometry is not None
        known = [find_geometry(place).name for place in places or ["auto"]]
        made += [{"measure": name, "geometry": place} for place in known[: 1 if single else None]]
    return made


def _check_cluster(cluster: str) -> None:
    """Refuse a cluster that nothing can be submitted to, before anything is written.

    Raises:
        UnknownName: no such cluster.
        UsageError: submitit is not installed.
    """
    if cluster not in CLUSTERS:
        raise UnknownName("cluster", cluster, CLUSTERS)
    if find_spec("submitit") is None:
        raise UsageError("--submit needs submitit: pip install 'isoflat[slurm]'")


def submitted(cluster: str, recipe: Recipe, source: str | None, folder: Path, workers: int, device: str | None) -> None:
    """Run workers on a cluster and wait for all of them: each follows the recipe on the same store.

    Slurm's own settings (partition, account, memory) are taken from its environment variables, such as SBATCH_PARTITION.

    Args:
        cluster: "slurm", or "local" for processes of this machine; it has been checked.
        recipe: recipe whose networks are to be made.
        source: path of the data; None where it comes with isoflat.
        folder: folder that all workers see; logs go to its `jobs`.
        workers: number of workers.
        device: device of the networks.

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
    """Train and measure every network that no other worker is at; the number of networks at the end."""
    return len(reproduce(recipe, source, out=folder, jobs=1, device=device).networks)
