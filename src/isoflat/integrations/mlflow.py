"""Rows of results as runs in MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from isoflat.core.errors import UsageError
from isoflat.integrations.tables import Parts, parts

PER_BATCH = 100
"""Entries in one request: MLflow takes no more settings or texts than this."""


def log(rows: Sequence[Mapping[str, Any]], name: str, tracking_uri: str | None = None) -> tuple[str, ...]:
    """One run per row: settings become parameters, numbers metrics, texts tags.

    Characters that MLflow does not allow in a name become `_`. The state of MLflow's own `start_run` is not touched.

    Args:
        rows: from a store of cells: `settings.…`, `result.…` and an address.
        name: of the experiment; made if it is not there.
        tracking_uri: where to; None for where MLflow's own settings say.

    Returns:
        Ids of the runs, in the order of the rows.

    Raises:
        UsageError: MLflow is not installed, cannot be reached, or refuses a value.
    """
    try:
        from mlflow import MlflowClient  # pyrefly: ignore[missing-import]
        from mlflow.exceptions import MlflowException  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UsageError(f"logging to MLflow needs its library: pip install mlflow ({error})") from error
    split = [parts(row) for row in rows]
    try:
        client = MlflowClient(tracking_uri=tracking_uri)
        found = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if found is None else found.experiment_id
        return tuple(_run(client, experiment, row) for row in split)
    except MlflowException as error:
        raise UsageError(f"MLflow refuses experiment {name!r} ({error}); runs logged before stay there") from error


def _run(client: Any, experiment: str, row: Parts) -> str:
    from mlflow.entities import Metric, Param, RunTag  # pyrefly: ignore[missing-import]

    run = client.create_run(experiment, run_name=row.name).info.run_id
    now = int(time.time() * 1000)
    settings = {name: value for name, value in row.settings.items() if value is not None}
    entries = [
        *({"params": Param(_allowed(name), str(value))} for name, value in settings.items()),
        *({"metrics": Metric(_allowed(name), value, now, 0)} for name, value in row.numbers.items()),
        *({"tags": RunTag(_allowed(name), value)} for name, value in row.texts.items()),
    ]
    for start in range(0, len(entries), PER_BATCH):
        batch: dict[str, list[Any]] = {}
        for entry in entries[start : start + PER_BATCH]:
            for kind, value in entry.items():
                batch.setdefault(kind, []).append(value)
        client.log_batch(run, **batch)
    client.set_terminated(run)
    return run


def _allowed(name: str) -> str:
    """A name of what MLflow allows on every system.

    >>> _allowed('norm."0.weight"')
    'norm._0.weight_'
    """
    return re.sub(r"[^\w.\- /]", "_", name)
