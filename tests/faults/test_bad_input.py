"""Bad input through the command line: the exit code, and a message that says where, what was given, what was wanted, what to type."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.cli import invoke
from tests.folders import model_folder, rows_file

RECIPE = """burnish: 1
name: try
model: base
dtype: float32
stages:
  - name: sft
    method: sft
    data: {file: train.jsonl}
    train: {steps: 2, batch_rows: 4, learning_rate: 1.0e-3, micro_tokens: 256}
"""

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def run(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(recipe text, *more arguments) -> (exit code, standard error), in a folder with a model and rows."""
    monkeypatch.chdir(tmp_path)
    os.symlink(base, tmp_path / "base")
    rows_file(tmp_path / "train.jsonl", 16)

    def go(text: str = RECIPE, *more: str) -> tuple[int, str]:
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        code = invoke(["run", "r.yaml", *more])
        return code, capsys.readouterr().err

    return go


def says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, f"{part!r} not in:\n{message}"


def nothing_was_made() -> None:
    assert not Path("runs/try").exists(), sorted(Path("runs").rglob("*"))


# ---- the recipe: 2 --------------------------------------------------------------------------------------------------


def test_misspelt_key(run: Run) -> None:
    code, message = run(RECIPE.replace("learning_rate", "lerning_rate"))
    assert code == 2
    says(message, "r.yaml:9", "lerning_rate", "Did you mean 'learning_rate'?")
    nothing_was_made()


def test_misspelt_method_and_its_parameter(run: Run) -> None:
    code, message = run(RECIPE.replace("method: sft", "method: {name: sft, wieghts: token_mean}"))
    assert code == 2
    says(message, "r.yaml:7", "'sft' has no parameter 'wieghts'", "Did you mean 'weights'?")


def test_duplicate_key(run: Run) -> None:
    code, message = run(RECIPE + "seed: 1\nseed: 2\n")
    assert code == 2
    says(message, "r.yaml:11", "seed", "10")


def test_contradictory_keys_with_the_arithmetic(run: Run) -> None:
    code, message = run(RECIPE.replace("steps: 2", "steps: 2, epochs: 3"))
    assert code == 2
    says(message, "both steps (2) and epochs (3)", "remove one")
    code, message = run(RECIPE.replace("batch_rows: 4", "batch_rows: 64"))
    assert code == 2
    says(message, "a step takes 64 rows and the data has 16")
    nothing_was_made()


def test_every_fault_is_told_at_once(run: Run) -> None:
    code, message = run(RECIPE.replace("model: base", "modle: base").replace("steps: 2", "steps: two"))
    assert code == 2
    says(message, "modle", "steps", "two")


def test_yaml_traps(run: Run) -> None:
    code, message = run(RECIPE.replace("name: try", "name: no"))
    assert code == 2
    says(message, "r.yaml:2", "name", '"no"')
    code, message = run(RECIPE.replace("1.0e-3", "1e-3") + "budget: {money: 1e-9}\n")
    assert code == 2, message
    says(message, "budget.money", "BURNISH_PRICE_PER_HOUR")


def test_override_with_a_typo_says_so(run: Run) -> None:
    code, message = run(RECIPE, "--set", "stages.sft.train.step=3")
    assert code == 2
    says(message, "--set stages.sft.train.step", "Did you mean 'steps'?")


# ---- the data: 3 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp', ("train.jsonl:2", "cut off")),
        (b'{"prompt": "a", "completion": "b"}\nnot json\n', ("train.jsonl:2",)),
        (b'{"prompt": "a"}\n' * 8, ("train.jsonl:1", "completion", "prompt")),
        (b'{"question": "a", "reply": "b"}\n' * 8, ("train.jsonl:1", "question", "reply", "columns")),
        (b"", ("train.jsonl",)),
        (b"\n\n\n", ("train.jsonl",)),
        (b'{"prompt": "a", "completion": "\xff"}\n' * 8, ("train.jsonl:1", "UTF-8")),
        (b'\xff\xfe{\x00"\x00', ("train.jsonl", "UTF-16")),
    ],
    ids=["truncated", "invalid", "no completion", "other columns", "empty", "blank", "bad bytes", "utf-16"],
)
def test_data_that_cannot_be_used(run: Run, content: bytes, parts: tuple[str, ...]) -> None:
    Path("train.jsonl").write_bytes(content)
    code, message = run(RECIPE.replace("batch_rows: 4", "batch_rows: 1"))
    assert code == 3, message
    says(message, *parts)
    nothing_was_made()


def test_a_byte_order_mark_is_harmless(run: Run) -> None:
    Path("train.jsonl").write_bytes(b"\xef\xbb\xbf" + Path("train.jsonl").read_bytes())
    code, message = run()
    assert code == 0, message


def test_all_labels_masked(run: Run) -> None:
    turn = {"role": "assistant", "content": "b", "train": False}
    row = {"messages": [{"role": "user", "content": "a"}, turn]}
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    code, message = run()
    assert code == 3, message
    says(message, "8 of 8 rows have no label", "completion", "train.jsonl:1")
    nothing_was_made()


def test_rows_too_long_are_counted(run: Run) -> None:
    code, message = run(RECIPE.replace("steps: 2", "steps: 2, max_tokens: 8"))
    assert code == 3
    says(message, "longer than 8 tokens", "drop")


def test_missing_file_is_found_by_check(run: Run) -> None:
    code, message = run(RECIPE.replace("train.jsonl", "trian.jsonl"))
    assert code == 2
    says(message, "trian.jsonl", "not found")


# ---- the model: 2 and 7 ---------------------------------------------------------------------------------------------


def copied(base: Path, to: Path) -> Path:
    to.mkdir()
    for path in base.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda data: data[: len(data) // 2], "interrupted download"),
        (lambda data: struct.pack("<Q", 2**60) + data[8:], "declares a header of"),
        (lambda data: data[:9] + b"\x00" + data[10:], "damaged header"),
        (lambda data: b"abc", "has 3 bytes"),
        (lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1), "expected to begin at"),
    ],
    ids=["truncated", "endless header", "broken header", "stub", "overlap"],
)
def test_corrupted_safetensors(run: Run, base: Path, tmp_path: Path, damage: Callable[[bytes], bytes], part: str) -> None:
    folder = copied(base, tmp_path / "damaged")
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    code, message = run(RECIPE.replace("model: base", "model: ./damaged"))
    assert code == 7, message
    says(message, "model.safetensors", part)
    nothing_was_made()


def test_a_flipped_byte_in_a_model_we_exported(run: Run) -> None:
    assert run()[0] == 0
    path = Path("runs/try/01-sft/model/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    code, message = run(RECIPE.replace("name: try", "name: next").replace("model: base", "model: ./runs/try/01-sft/model"))
    assert code == 7
    says(message, "sha256", "manifest")


def test_pickled_weights_are_refused_and_never_opened(run: Run, base: Path, tmp_path: Path) -> None:
    folder = copied(base, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    import pickle

    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {canary}",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    code, message = run(RECIPE.replace("model: base", "model: ./pickled"))
    assert code == 2
    says(message, "pytorch_model.bin", "safetensors", "convert")
    assert not canary.exists()


def test_remote_code_is_refused(run: Run, base: Path, tmp_path: Path) -> None:
    folder = copied(base, tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    code, message = run(RECIPE.replace("model: base", "model: ./remote"))
    assert code == 2
    says(message, "auto_map", "never runs code")


def test_a_model_that_is_not_there(run: Run) -> None:
    code, message = run(RECIPE.replace("model: base", "model: sparc"))
    assert code == 2
    says(message, "sparc", "spark")


# ---- the run folder: 8, 9, 2 ----------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder(run: Run, tmp_path: Path) -> None:
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom burnish.core.runs import RunFolder\n"
        "with RunFolder(Path('runs/try')):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert holder.stdout is not None and holder.stdout.readline()
    try:
        code, message = run()
        assert code == 8
        says(message, "runs/try", f"process {holder.pid}", "--set name=")
    finally:
        holder.kill()
        holder.wait()


def test_complete_changed_and_unfinished_runs(run: Run) -> None:
    assert run()[0] == 0
    code, message = run()
    assert code == 9
    says(message, "already complete", "report")
    known = json.loads(Path("runs/try/run.json").read_text())
    Path("runs/try/run.json").write_text(json.dumps(known | {"status": "interrupted"}))
    code, message = run()
    assert code == 2
    says(message, "unfinished", "--resume")
    changed = RECIPE.replace("1.0e-3", "5.0e-3")
    code, message = run(changed, "--resume")
    assert code == 2
    says(message, "stages.sft.train.learning_rate", "0.001", "0.005", "--allow-change stages.sft.train.learning_rate")
    code, message = run(changed, "--resume", "--allow-change", "stages.sft.train.learning_rate")
    assert code == 0, message


@pytest.mark.parametrize("name", ["../../x", "/abs", "a b", "con"])
def test_odd_run_names(run: Run, name: str) -> None:
    code, message = run(RECIPE.replace("name: try", f"name: {name!r}"))
    assert code == 2
    says(message, "r.yaml:2", "cannot name a folder")
    assert not Path("runs").exists()
