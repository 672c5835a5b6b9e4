"""The verbs that look: what a person reads, what a script reads, and how they fail."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish import cli
from burnish.cli import invoke
from burnish.config.load import packaged
from burnish.core.errors import DataError
from tests.config.tables import tables  # noqa: F401

pytestmark = pytest.mark.usefixtures("tables")
Capture = pytest.CaptureFixture[str]


def out(capsys: Capture, *words: str, code: int = 0) -> str:
    """Standard output of a command line that ends with `code`, having said nothing on standard error."""
    assert invoke(words) == code
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def err(capsys: Capture, *words: str, code: int = 2) -> str:
    assert invoke(words) == code
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def as_json(capsys: Capture, *words: str, code: int = 0) -> Any:
    return json.loads(out(capsys, *words, "--json", code=code))


def test_ls_names_recipes_and_rows_in_lines_of_a_hundred_columns(capsys: Capture) -> None:
    text = out(capsys, "ls")
    assert "recipes\n" in text and re.search(r"^  first_steps/quickstart +Teach the bundled model", text, re.MULTILINE)
    assert "method\n  sft    Maximum likelihood (no paper).\n  simpo  Simple preference optimisation" in text
    assert max(map(len, text.splitlines())) <= 100


def test_ls_of_one_kind(capsys: Capture) -> None:
    assert (
        out(capsys, "ls", "schedule") == "schedule\n  constant  The peak rate throughout.\n  cosine    Half a cosine.\n"
    )
    assert as_json(capsys, "ls", "schedule")["schedule"][1] == {"name": "cosine", "about": "Half a cosine."}
    assert {"name": "loss"}.items() <= as_json(capsys, "ls", "metrics")["metrics"][0].items()
    assert "stages.<name>.train.learning_rate the peak step size" in " ".join(out(capsys, "ls", "keys").split())
    assert "there is no list of 'methods'. Did you mean 'method'?" in err(capsys, "ls", "methods")


def test_show_a_row(capsys: Capture) -> None:
    text = out(capsys, "show", "simpo")
    assert text.startswith("simpo (method)\n  Simple preference optimisation (arXiv:2405.14734).\n\n  More words.\n")
    assert "  beta   a number; default 2.0\n" in text and "  steps  a whole number or null; default None\n" in text
    assert "  paper   arXiv:2405.14734\n" in text and "pairs.py:2" in text
    (row,) = as_json(capsys, "show", "method/simpo")["rows"]
    assert row["parameters"][1] == {"name": "gamma", "type": "float", "required": False, "default": 1.0}
    assert row["paper"] == "arXiv:2405.14734" and len(row["sha256"]) == 64
    assert "  also    self_consistency\n" in out(capsys, "show", "vote")


def test_show_a_recipe_a_metric_and_your_own_function(capsys: Capture) -> None:
    assert out(capsys, "show", "first_steps/quickstart") == packaged()["first_steps/quickstart"].read_text()
    assert "grad_norm (metric, in 1; better: neither)\n  Euclidean norm" in out(capsys, "show", "grad_norm")
    Path("own.py").write_text("raise SystemExit\ndef mine(*, k: int):\n    'Mine.'\n")
    assert "  k  a whole number; needed\n" in out(capsys, "show", "own.py:mine")


def test_show_two_rows_says_what_differs(capsys: Capture) -> None:
    text = out(capsys, "show", "constant", "--vs", "cosine")
    assert text == "constant and cosine (schedule)\n         constant    cosine\n  floor  takes none  0.0\n"
    assert as_json(capsys, "show", "simpo", "--vs", "sft")["comparisons"][0]["differences"]["beta"] == [2.0, None]
    assert out(capsys, "show", "vote", "--vs", "vote").endswith("  They set the same.\n")
    assert "'vote' and 'cosine' are not rows of one table" in err(capsys, "show", "vote", "--vs", "cosine")
    assert "Did you mean 'cosine'?" in err(capsys, "show", "constant", "--vs", "cosin")


def test_show_dapo_against_grpo_names_the_axes_and_imports_no_torch() -> None:
    code = (
        "import sys; from burnish.cli import invoke; assert invoke(['show', 'dapo', '--vs', 'grpo']) == 0; "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["dapo", "and", "grpo", "(method)"],
        ["dapo", "grpo"],
        ["weights", "token_mean", "sequence_mean"],
        ["kl_coef", "0.0", "0.04"],
        ["sequence_filters", '["dead_groups"]', "[]"],
        ["clip_high", "0.28", "0.2"],
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("self_consistency", "Did you mean 'vote'?"),
        ("quickstart", "Did you mean 'first_steps/quickstart'?"),
        ("simpoo", "Did you mean 'simpo'?"),
        ("grad-norm", "Did you mean 'grad_norm'?"),
        ("method/smpo", "Did you mean 'simpo'?"),
    ],
)
def test_show_of_something_else_names_what_was_meant(capsys: Capture, name: str, hint: str) -> None:
    assert hint in err(capsys, "show", name)


def test_cp_copies_and_never_overwrites(capsys: Capture) -> None:
    assert "quickstart.yaml\n  edit it, then: burnish check quickstart.yaml" in out(
        capsys, "cp", "first_steps/quickstart"
    )
    assert Path("quickstart.yaml").read_bytes() == packaged()["first_steps/quickstart"].read_bytes()
    Path("quickstart.yaml").write_text("mine")
    assert "quickstart.yaml  is already there; it was not touched" in err(capsys, "cp", "first_steps/quickstart")
    assert Path("quickstart.yaml").read_text() == "mine"
    Path("folder").mkdir()
    assert as_json(capsys, "cp", "first_steps/own_data", "folder")["file"] == "folder/own_data.yaml"
    assert as_json(capsys, "cp", "first_steps/own_data", "folder/b.yaml")["file"] == "folder/b.yaml"
    assert "cannot be written: No such file" in err(capsys, "cp", "first_steps/own_data", "gone/b.yaml", code=7)
    assert "Did you mean 'first_steps/quickstart'?" in err(capsys, "cp", "first_steps/quickstar")


# ---- the frame around every verb ------------------------------------------------------------------------------------


def test_usage(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "VERBS", {verb: f"burnish.cli.{verb}" for verb in ("ls", "show", "cp", "check")})
    for words in ((), ("--help",)):
        assert all(f"\n  {verb} " in out(capsys, *words) for verb in cli.VERBS)
    assert "burnish cp [OPTIONS]" in out(capsys, "cp", "--help") and cli.VERBS["cp"]
    assert as_json(capsys, "--version")["version"]
    assert "burnish  'chekc' is not a verb. Did you mean 'check'?" in err(capsys, "chekc")
    assert "burnish show  Missing argument" in err(capsys, "show")
    assert "burnish ls  No such option: --foo" in err(capsys, "ls", "--foo")
    assert "burnish ls  Got unexpected extra argument" in err(capsys, "ls", "a", "b")


def test_errors_are_one_json_object_too(capsys: Capture) -> None:
    told = as_json(capsys, "show", "simpoo", code=2)
    assert told["exit_code"] == 2 and told["error"]["kind"] == "ConfigError"
    assert told["error"]["where"] == "burnish show" and told["error"]["remedy"] == "what there is: burnish ls"
    assert as_json(capsys, "nothing", code=2)["error"]["message"].startswith("'nothing' is not a verb")
    assert as_json(capsys, "show", code=2)["error"]["message"].startswith("Missing argument")


def failing(error: BaseException) -> Any:
    def ls() -> None:
        raise error

    return type("module", (), {"ls": staticmethod(ls)})


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("bad row", where="a.jsonl:3", remedy="mend it"), 3, "error: a.jsonl:3  bad row\n  mend it\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (ZeroDivisionError("oops"), 1, "error: this is a bug in burnish: ZeroDivisionError: oops\n"),
        (ImportError("no x", name="burnish.gone"), 1, "error: this is a bug in burnish: ImportError: no x"),
        (
            ModuleNotFoundError("No module named 'nowhere'", name="nowhere.sub"),
            4,
            "nowhere is not installed\n  pip install 'nowhere'",
        ),
        (ImportError("cannot import name 'x' from 'yaml'", name="yaml.y"), 4, "yaml"),
        (DataError("\x1b[31mred\x07"), 3, "error: \\x1b[31mred\\x07\n"),
        (SystemExit(5), 5, ""),
    ],
)
def test_exit_codes(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    real = cli.importlib.import_module
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda name: failing(error) if name == "burnish.cli.ls" else real(name)
    )
    if isinstance(error, SystemExit):
        with pytest.raises(SystemExit):
            invoke(["ls"])
        return
    told = err(capsys, "ls", code=code)
    assert said in told
    assert ("Traceback" in told) == (code == 1)


def test_a_package_that_is_too_old_names_the_version_found_and_the_one_wanted(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ImportError("cannot import name 'New' from 'typer'", name="typer")
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["torch>=2.11", "typer>=0.15", "pytest ; extra == 'dev'"]
    )
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: failing(error))
    told = err(capsys, "ls", code=4)
    assert f"typer {importlib.metadata.version('typer')} is installed and does not do" in told
    assert "pip install 'typer>=0.15'" in told


def test_a_reader_that_leaves_early_and_a_poor_terminal() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "40", "LANG": "C"}
    command = f"{sys.executable} -m burnish show first_steps/quickstart"
    done = subprocess.run(
        f"{command} | head -c 1", shell=True, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "b" and done.stderr == ""
