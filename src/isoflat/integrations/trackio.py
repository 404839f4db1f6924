"""Rows of results as runs in Trackio."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from isoflat.core.errors import UsageError
from isoflat.integrations.tables import parts


def log(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """One run per row: settings and texts become its configuration, numbers its metrics.

    They stay on this machine, unless Trackio's own environment variables say otherwise. What Trackio prints goes to
    the standard error, away from results. A configuration's names that begin with `_` are Trackio's own: such a name
    gets `x` in front.

    Args:
        rows: from a store of cells: `settings.…`, `result.…` and an address.
        name: of the project; made if it is not there.

    Raises:
        UsageError: Trackio is not installed, or refuses the project's name.
    """
    try:
        import trackio  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UsageError(f"logging to Trackio needs its library: pip install trackio ({error})") from error
    for row in [parts(row) for row in rows]:
        config = {_free(key): value for key, value in {**row.texts, **row.settings}.items()}
        with contextlib.redirect_stdout(sys.stderr):
            try:
                run = trackio.init(
                    project=name, name=row.name, config=config, embed=False, auto_log_gpu=False, auto_log_cpu=False
                )
            except ValueError as error:
                raise UsageError(f"Trackio refuses project {name!r}: {error}") from error
            try:
                run.log(dict(row.numbers))
            finally:
                trackio.finish()  # not `run.finish`: the next `init` would finish the run once more


def _free(name: str) -> str:
    return f"x{name}" if name.startswith("_") else name
