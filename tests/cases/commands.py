"""The command line in a process that has imported everything already."""

import os
import sys

from typer.testing import CliRunner

from isoflat.cli.main import app


def printed(folder: str, arguments: list[str]) -> tuple[int, str, str]:
    """The exit status of a command in a folder, and what it wrote to its two outputs."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr
