"""`burnish cp`: a recipe of your own to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli import reply
from burnish.config.load import find
from burnish.core.errors import ConfigError, StorageError


def cp(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe, such as first_steps/quickstart, or a file.")],
    destination: Annotated[Path | None, typer.Argument(metavar="[DEST]", help="A file or a folder.")] = None,
) -> None:
    """Copy a recipe out to edit it; never overwrites a file."""
    source, _ = find(recipe)
    target = destination or Path(source.name)
    if target.is_dir():
        target = target / source.name
    try:
        with open(target, "xb") as out:  # x: fails when the file is there, also when it came this instant
            out.write(source.read_bytes())
    except FileExistsError as error:
        remedy = f"name another file: burnish cp {recipe} my-{source.name}"
        raise ConfigError("is already there; it was not touched", where=str(target), remedy=remedy) from error
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(target)) from error
    reply({"recipe": recipe, "file": str(target)}, f"{target}\n  edit it, then: burnish check {target}")
