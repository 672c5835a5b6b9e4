"""kill -9 at random moments, inside saving and evaluation too, then --resume: the run that was never interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.core.runs import file_sha256
from tests.folders import model_folder, rows_file

KILLS = 20

RECIPE = """burnish: 1
name: {name}
model: {model}
dtype: float32
seed: 3
evals:
  repeats: {{file: {test}, strategies: [greedy, "pass@2"], max_new_tokens: 8, temperature: 1.0}}
stages:
  - name: first
    method: sft
    data: {{file: {train}}}
    train: {{steps: 12, batch_rows: 8, learning_rate: 1.0e-3, checkpoint_every: 2, validate_every: 3, validation_rows: 8, micro_tokens: 64}}
  - name: second
    method: sft
    adapter: {{name: lora, rank: 4, dropout: 0.1}}
    data: {{file: {train}}}
    train: {{steps: 8, batch_rows: 8, learning_rate: 1.0e-3, checkpoint_every: 3, schedule: linear, micro_tokens: 64}}
"""


class Server:
    """Talks to tests/faults/server.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.read() == {"ready": True}

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run(self, *argv: str, kill: Callable[[float], bool] | None = None) -> tuple[int, float]:
        """(exit code, seconds); kills the child as soon as `kill(seconds it has run)` says so."""
        assert self.process.stdin is not None
        order = {"argv": list(argv), "cwd": str(self.folder), "log": str(self.folder / "log.txt")}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        pid, begin = self.read()["pid"], time.monotonic()
        if kill is not None:
            while not kill(time.monotonic() - begin):
                if not running(pid):
                    break
                time.sleep(0.0005)
            with contextlib.suppress(ProcessLookupError):  # it finished first
                os.kill(pid, signal.SIGKILL)
        return self.read()["code"], time.monotonic() - begin


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("kill")
    model_folder(folder / "base")
    rows_file(folder / "train.jsonl", 40)
    rows_file(folder / "test.jsonl", 16)
    for name in ("whole", "killed"):
        text = RECIPE.format(name=name, model=folder / "base", train=folder / "train.jsonl", test=folder / "test.jsonl")
        (folder / f"{name}.yaml").write_text(text)
    made = Server(folder)
    yield made
    made.process.terminate()


def facts(root: Path) -> dict[str, Any]:
    """Everything that must be equal: weights, metrics, counted ledger, evaluations."""
    out: dict[str, Any] = {}
    for stage in sorted(p for p in root.glob("[0-9][0-9]-*")):
        for path in sorted((stage / "model").glob("*.safetensors")):
            out[f"{stage.name}/{path.name}"] = file_sha256(path)
        metrics = stage / "metrics.jsonl"
        out[f"{stage.name}/metrics"] = metrics.read_text() if metrics.exists() else ""
        out[f"{stage.name}/counted"] = json.loads((stage / "ledger.json").read_text())["counted"]
        for path in sorted((stage / "evals").glob("*.json")):
            out[f"{stage.name}/{path.name}"] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
    return out


def moments(root: Path, whole_s: float) -> Iterator[tuple[str, Callable[[float], bool]]]:
    """Where to kill: inside a checkpoint, inside an export, inside an evaluation, and at any moment."""
    dice = random.Random(0)

    def saving(_: float) -> bool:
        return any(root.glob("*/checkpoint-*.tmp-*/state.safetensors"))

    def exporting(_: float) -> bool:
        return any(root.glob("*/.model.tmp-*/*"))

    def judging(_: float) -> bool:
        judged = [p.parent for p in root.glob("*/model/manifest.json")]
        return any(len(list((p.parent / "evals").glob("*.json"))) < 2 for p in judged)

    while True:
        for name, when in (("saving", saving), ("judging", judging), ("exporting", exporting)):
            yield name, when
            for _ in range(3):
                after = dice.uniform(0.0, 0.6) * whole_s
                yield "any", lambda t, after=after: t >= after


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_twenty_times_and_resumed_equals_uninterrupted(server: Server, record_property: Any) -> None:
    folder = server.folder
    root = folder / "runs/killed"
    code, whole_s = server.run("run", "whole.yaml")
    assert code == 0, (folder / "log.txt").read_text()[-3000:]
    when = moments(root, whole_s)
    kills: Counter[str] = Counter()
    argv = ["run", "killed.yaml"]
    while True:
        name, moment = next(when) if kills.total() < KILLS else ("", None)
        code, _ = server.run(*argv, kill=moment)
        if (root / "run.json").exists():
            argv = ["run", "killed.yaml", "--resume"]
        if code == -signal.SIGKILL:
            kills[name] += 1
            continue
        # 9: it was killed after its last work was done, and there was only the report left to write
        assert code in (0, 9), (folder / "log.txt").read_text()[-3000:]
        assert json.loads((root / "run.json").read_text())["status"] == "complete"
        assert (root / "report.json").exists() and (root / "report.html").exists()
        assert facts(root) == facts(folder / "runs/whole")
        if kills.total() >= KILLS:
            break
        # it finished before all kills were spent: what it left is right, so begin afresh
        shutil.rmtree(root)
        argv = ["run", "killed.yaml"]
    assert kills["saving"] and kills["judging"]
    leftovers = [p.name for p in root.rglob("*.tmp-*")]
    assert not leftovers, leftovers
    record_property("measured", f"killed {kills.total()} times ({dict(kills)}): weights, metrics and counted ledger equal bit for bit")
