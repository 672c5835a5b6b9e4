"""`burnish quickstart`: the shipped recipe on the shipped model; again, and it prints the finished verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli import reply, wants_json
from burnish.cli.check import Overrides
from burnish.cli.run import footer
from burnish.core.machine import uncollected

RECIPE = "first_steps/quickstart"


def quickstart(
    overrides: Overrides = None,
    runs: Annotated[Path, typer.Option(help="The folder that holds run folders.")] = Path("runs"),
) -> None:
    """Post-train the bundled model and say what it was worth. Needs no network, no account, a few minutes."""
    from burnish.core.errors import CompleteError
    from burnish.core.runs import read_json
    with uncollected():
        from burnish.pipeline import run as run_recipe
    from burnish.train.log import Progressing

    folder = runs / "quickstart"
    try:
        # An interrupted quickstart simply goes on: there is one recipe and nothing to choose.
        done = run_recipe(RECIPE, overrides or (), resume=(folder / "run.json").exists(), under=runs, progress=Progressing(wants_json()))
        folder, report = done.folder, done.report
    except CompleteError:
        report = read_json(folder / "report.json")
    reply({"run": str(folder), "verdict": report["verdict"]}, footer(folder, report))
