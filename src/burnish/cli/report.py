"""`burnish report`: what a run was worth, read again from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli import reply
from burnish.core.errors import ConfigError


def report(
    run: Annotated[str, typer.Argument(help="A run folder, or the name of one under --runs.")],
    runs: Annotated[Path, typer.Option(help="The folder that holds run folders.")] = Path("runs"),
) -> None:
    """Write report.html and report.json of a run again: finished, running, interrupted or crashed."""
    from burnish.report.verdict import summary
    from burnish.report.write import write_report

    folder = find(run, runs)
    written = write_report(folder)
    known = {"run": str(folder), "state": written["run"]["state"], "verdict": written["verdict"], "warnings": written["warnings"]}
    files = {"html": str(folder / "report.html"), "json": str(folder / "report.json")}
    reply(known | files, f"{summary(written)}\n\n  report  {files['html']}\n  data    {files['json']}")


def find(run: str, runs: Path) -> Path:
    """A run folder by its path, or by its name. Raises ConfigError that names the runs there are."""
    for folder in (Path(run), runs / run):
        if folder.is_dir():
            return folder
    there = sorted(p.parent.name for p in runs.glob("*/run.json"))[:8]
    remedy = f"there {'is' if len(there) == 1 else 'are'}: {', '.join(there)}" if there else "make one with: burnish quickstart"
    raise ConfigError("there is no such run", where=run[:200], remedy=remedy)
