"""The command line. One file a verb, imported only when it is needed; importing one never imports torch.

Every verb takes `--json` and then prints one JSON object, errors too. Exit codes are those of `core/errors`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import typer

from burnish.core.errors import BurnishError, ConfigError, MachineError
from burnish.core.table import did_you_mean

VERBS = {  # verb -> module with a function of the same name (- is _); in the order of `burnish --help`
    "quickstart": "burnish.cli.quickstart",
    "run": "burnish.cli.run",
    "eval": "burnish.cli.eval",
    "chat": "burnish.cli.chat",
    "solve": "burnish.cli.solve",
    "report": "burnish.cli.report",
    "ls": "burnish.cli.ls",
    "show": "burnish.cli.show",
    "cp": "burnish.cli.cp",
    "check": "burnish.cli.check",
    "estimate": "burnish.cli.estimate",
    "coverage": "burnish.cli.coverage",
    "reward-test": "burnish.cli.reward_test",
    "doctor": "burnish.cli.doctor",
}
UsageError: Any = typer.BadParameter.__bases__[0]  # typer carries its own click, or uses yours
_json = False


def wants_json() -> bool:
    """True when the one thing on standard output must be a JSON object: progress then belongs on standard error."""
    return _json


def reply(data: Mapping[str, Any] | Sequence[Any], text: str) -> None:
    """The answer of a verb: `data` with --json, `text` without."""
    print(json.dumps(data, indent=1) if _json else text)


def main() -> NoReturn:
    """The `burnish` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Messages go to standard error, or into the JSON object."""
    global _json
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    _json = "--json" in arguments[:end]
    words = [*(word for word in arguments[:end] if word != "--json"), *arguments[end:]]
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BurnishError as error:
        return _fail(error, error.exit_code)
    except UsageError as error:
        return _fail(ConfigError(error.format_message(), where=f"burnish {words[0]}" if words else "burnish"), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(BurnishError("interrupted"), 130)
    except BrokenPipeError:  # `burnish ls | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ImportError as error:
        if (found := _dependency(error)) is not None:
            return _fail(found, found.exit_code)
        return _bug(error)
    except Exception as error:
        return _bug(error)


def _run(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        from burnish import __version__

        reply({"version": __version__}, f"burnish {__version__}")
        return 0
    verb = words[0] if words and not words[0].startswith("-") else None
    if verb is not None and verb not in VERBS:
        verbs = f"the verbs: {', '.join(VERBS)}"
        raise ConfigError(f"{verb!r} is not a verb.{did_you_mean(verb, VERBS)}", where="burnish", remedy=verbs)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    for name in [verb] if verb else VERBS:
        function = getattr(importlib.import_module(VERBS[name]), name.replace("-", "_"))
        app.command(name, epilog="--json prints one JSON object instead.")(function)
    if verb is None:
        app.callback(epilog="Every verb takes --json. Start with: burnish ls")(_about)
    command = typer.main.get_command(app)
    name, rest = (f"burnish {verb}", words[1:]) if verb else ("burnish", words or ["--help"])
    code = int(command.main(args=rest, prog_name=name, standalone_mode=False) or 0)
    if code == 130:  # typer turns Ctrl-C into this number
        raise KeyboardInterrupt
    return code


def _about() -> None:
    """Post-training for language models, with what every step cost and was worth."""


def _fail(error: BurnishError, code: int) -> int:
    """One clear message: on standard error, or as the JSON object."""
    if _json:
        known: dict[str, Any] = {"kind": type(error).__name__, "message": error.message}
        known |= {"where": error.where, "remedy": error.remedy}
        if faults := getattr(error, "faults", ()):
            known["faults"] = [vars(fault) for fault in faults]
        print(json.dumps({"error": known, "exit_code": code}, indent=1))
    else:
        text = re.sub(r"[^\n\x20-\x7e\xa0-\U0010ffff]", lambda m: ascii(m[0])[1:-1], error.render())
        typer.echo(f"{typer.style('error:', fg='red', bold=True)} {text}", err=True)
    return code


def _bug(error: Exception) -> int:
    if not _json:
        traceback.print_exception(error)
    remedy = "please report it with the lines above and the command you typed"
    return _fail(BurnishError(f"this is a bug in burnish: {type(error).__name__}: {error}", remedy=remedy), 1)


def _dependency(error: ImportError) -> MachineError | None:
    """A package that is missing or too old, in one line. None when the import is one of our own."""
    name = (error.name or "").partition(".")[0]
    if name in ("", "burnish"):
        return None
    try:
        needs = importlib.metadata.requires("burnish") or []
    except importlib.metadata.PackageNotFoundError:
        needs = []
    wanted = next((need.partition(";")[0] for need in needs if re.match(rf"{re.escape(name)}\b", need)), name)
    try:
        state = f"{name} {importlib.metadata.version(name)} is installed and does not do: {error}"
    except importlib.metadata.PackageNotFoundError:
        state = f"{name} is not installed"
    return MachineError(state, where="burnish", remedy=f"pip install '{wanted}'")
