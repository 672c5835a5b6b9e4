"""`burnish run`: a recipe, from its base model to its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli import reply, wants_json
from burnish.cli.check import Overrides
from burnish.core.machine import uncollected


def run(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe, such as first_steps/quickstart, or a file.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run of this recipe.")] = False,
    allow_change: Annotated[
        list[str] | None, typer.Option("--allow-change", metavar="KEY", help="With --resume: a key that may differ from before.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="The folder that holds run folders.")] = Path("runs"),
) -> None:
    """Run a recipe: train its stages, evaluate before and after, write the report."""
    with uncollected():
        from burnish.pipeline import run as run_recipe
    from burnish.train.log import Progressing

    done = run_recipe(recipe, overrides or (), resume=resume, allow_change=allow_change or (), under=runs, progress=Progressing(wants_json()))
    reply({"run": str(done.folder), "verdict": dict(done.verdict)}, footer(done.folder, done.report))


def footer(folder: Path, report: Mapping[str, Any]) -> str:
    """What a finished run says last: the verdict, where things are, what to type next."""
    from burnish.report.verdict import summary

    return f"\n{summary(report)}\n\n  report  {folder / 'report.html'}\n  model   {_model(folder)}\n  talk    burnish chat {_model(folder)}"


def _model(folder: Path) -> Path:
    found = sorted(folder.glob("[0-9][0-9]-*/model"))
    return found[-1] if found else folder
