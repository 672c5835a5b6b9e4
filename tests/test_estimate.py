"""`estimate`: counts are those of the run, nothing is trained, and a limit on memory is kept by a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import estimate as module
from burnish import miniature
from burnish.build import build_stage
from burnish.cli import invoke
from burnish.config.load import load
from burnish.core.errors import MachineError
from burnish.core.runs import read_json
from burnish.estimate import estimate
from burnish.models.load import load_policy
from tests.folders import model_folder, rows_file

RECIPE = """burnish: 1
name: try
model: {model}
dtype: float32
evals:
  repeats: {{file: {test}, strategies: [greedy, "vote:3"], max_new_tokens: 12, temperature: 1.0}}
stages:
  - name: sft
    method: sft
    data: {{file: {train}}}
    train: {{steps: 5, batch_rows: 8, learning_rate: 1.0e-3, validate_every: 2, validation_rows: 8, weight_decay: 0.1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("estimate")
    model_folder(made / "base", hidden_size=64, num_hidden_layers=4)
    rows_file(made / "train.jsonl", 48)
    rows_file(made / "test.jsonl", 12)
    text = RECIPE.format(model=made / "base", train=made / "train.jsonl", test=made / "test.jsonl")
    (made / "r.yaml").write_text(text, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return estimate(folder / "r.yaml")


def phases(stage: dict[str, Any]) -> dict[str, Any]:
    return {p["name"]: p for p in stage["phases"]}


def test_counts_are_those_of_the_run(folder: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    assert invoke(["run", str(folder / "r.yaml")]) == 0
    base, sft = (read_json(folder / f"runs/try/{name}/ledger.json")["counted"] for name in ("00-base", "01-sft"))
    guess = phases(found["stages"][1])
    assert guess["train"]["tokens"] == sft["train"]["stream_tokens"]
    assert guess["train"]["useful_flops"] == sft["train"]["useful_flops"]
    assert guess["train"]["executed_flops"] == pytest.approx(sft["train"]["executed_flops"], rel=0.01)
    assert guess["validation"]["tokens"] == sft["validation"]["stream_tokens"]  # after steps 2, 4 and the last
    assert guess["validation"]["executed_flops"] == pytest.approx(sft["validation"]["executed_flops"], rel=0.02)
    drawn = phases(found["stages"][0])["repeats"]
    assert drawn["tokens"] == pytest.approx(base["decode"]["sampled_tokens"], rel=0.15)
    assert drawn["executed_flops"] == pytest.approx(base["sampling"]["executed_flops"], rel=0.25)
    capsys.readouterr()


def test_items_add_up_and_speeds_are_stated(found: dict[str, Any]) -> None:
    for stage in found["stages"]:
        assert stage["peak_bytes"] == sum(stage["memory"].values()) > 0
        assert stage["executed_flops"] == sum(p["executed_flops"] for p in stage["phases"]) >= stage["useful_flops"] > 0
        for p in stage["phases"]:
            assert p["seconds"] >= 0 and (p["executed_flops"] == 0 or p["gflops"] == pytest.approx(p["executed_flops"] / p["seconds"] / 1e9, abs=0.01))
    assert found["total"]["seconds"] == pytest.approx(sum(s["seconds"] for s in found["stages"]), abs=0.01)
    assert found["total"]["peak_bytes"] == max(s["peak_bytes"] for s in found["stages"])
    weights = sum(x.numel() * x.element_size() for x in load_policy(found["model"], dtype="float32", probe=False).model.parameters())
    training = found["stages"][1]["memory"]
    if "moments" in training:
        assert training["weights"] == pytest.approx(weights, rel=0.01) and training["moments"] == 2 * training["gradients"]
    assert phases(found["stages"][1])["repeats"]["assumed"] == "answers as long as the base's"


def test_the_miniature_changes_no_weight(folder: Path) -> None:
    recipe = load(folder / "r.yaml", ()).recipe
    policy = load_policy(recipe.model, dtype="float32")
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    taken = miniature.few_steps(build_stage(recipe, recipe.stages[0], policy), policy)
    assert taken.flops > 0 and taken.holdings.moments_to_come == 0  # real steps were taken
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())
    assert not any(p.grad is not None for p in policy.model.parameters())


def test_a_long_batch_is_cut_and_the_rest_is_reckoned(folder: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniature, "PROBE_S", 1e-4)
    short = estimate(folder / "r.yaml")
    a, b = (phases(f["stages"][1])["train"] for f in (found, short))
    assert a["tokens"] == b["tokens"] and a["useful_flops"] == b["useful_flops"]
    assert b["executed_flops"] == pytest.approx(a["executed_flops"], rel=0.05)


def test_the_verb_prints_a_table_or_one_object_and_refuses_what_run_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--set", "stages=[]", "--set", "evals.repeats.max_new_tokens=2"]
    assert invoke(["estimate", str(folder / "r.yaml"), *only]) == 0
    said = capsys.readouterr().out
    for part in ("repeats", "GF/s", "of peak", "Peak memory above", "weights", "in total"):
        assert part in said
    assert invoke(["estimate", str(folder / "r.yaml"), *only, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["name"] == "base"
    assert invoke(["estimate", str(folder / "r.yaml"), "--set", "stages.sft.data.file=none.jsonl"]) == 2
    assert invoke(["estimate", str(folder / "r.yaml"), "--set", "stages.sft.train.memory_bytes=1000"]) == 4
    message = capsys.readouterr().err
    for part in ("train.memory_bytes", "does not fit", "weights", "gradients", "moments", "head, a chunk", "activations of", "free"):
        assert part in message


LIMITED = """
import sys
from pathlib import Path
from burnish.core.machine import resident_bytes
from burnish.estimate import import_everything
from burnish.pipeline import run
from burnish.train.log import Progressing
import_everything("spark")
limit = resident_bytes() + 140_000_000
Path("/proc/self/clear_refs").write_text("5")
done = run(sys.argv[1], [f"stages.sft.train.memory_bytes={limit}"] if sys.argv[2] == "limited" else (), under=Path(sys.argv[2]), progress=Progressing(True))
status = Path("/proc/self/status").read_text().splitlines()
print(limit, next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_limit_on_memory_is_kept(tmp_path: Path) -> None:
    """A fresh process stays under `train.memory_bytes`, and without it does not; what it learns is the same."""
    (tmp_path / "r.yaml").write_text(
        "burnish: 1\nname: r\nmodel: spark\nstages:\n  - name: sft\n    method: sft\n    data: {task: sums, levels: [3], rows: 512}\n"
        "    train: {steps: 2, batch_rows: 128, learning_rate: 1.0e-4}\n",
        encoding="utf-8",
    )
    losses = []
    for name in ("limited", "free"):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-c", LIMITED, "r.yaml", name]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        limit, peak = map(int, done.stdout.split()[-2:])
        assert (peak <= limit) == (name == "limited"), (name, limit, peak)
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "r/01-sft/metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    plan = read_json(tmp_path / "limited/r/decisions.json")["memory.sft"]["plans"][0]
    assert plan["micro_tokens"] < 4000 or plan["checkpointing"] == "layers"


DRAWING = """burnish: 1
name: {name}
model: spark
dtype: float32
stages:
  - name: rl
    method: {method}
    data: {{task: sums, levels: [2, 3], rows: 256}}
    rewards: task
    rollouts: {{group_size: 8, max_new_tokens: 32}}
    train: {{steps: 4, batch_rows: 16, learning_rate: 1.0e-5}}
"""


@pytest.mark.parametrize("method", ["grpo", "{name: rest_em, rounds: 2, prompts: 32}"])
def test_a_stage_that_draws_takes_what_its_miniature_says(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens within 30 % of a run's and time within a factor of 2; a machine that others use too is asked up to three times."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(miniature, "PROBE_S", 1.0)
    for attempt in range(3):
        name = f"try-{attempt}"
        Path("r.yaml").write_text(DRAWING.format(name=name, method=method), encoding="utf-8")
        guess = phases(estimate("r.yaml")["stages"][1])
        assert invoke(["run", "r.yaml"]) == 0
        ledger = read_json(tmp_path / f"runs/{name}/01-rl/ledger.json")
        counted = ledger["counted"]
        sampled = counted["prepare"]["sampled_tokens"] + counted["prepare"]["prefill_tokens"]
        learned = counted["train"]["stream_tokens"] + counted["prepare"]["scored_tokens"]
        assert guess["rollouts"]["tokens"] == pytest.approx(sampled, rel=0.3) and guess["train"]["tokens"] == pytest.approx(learned, rel=0.3)
        executed = sum(row.get("executed_flops", 0) for row in counted.values())
        assert guess["rollouts"]["executed_flops"] + guess["train"]["executed_flops"] == pytest.approx(executed, rel=0.3)
        assert "at most 32" in guess["rollouts"]["assumed"]
        ratio = (guess["rollouts"]["seconds"] + guess["train"]["seconds"]) / sum(ledger["measured"]["seconds"].get(n, 0) for n in ("prepare", "reward", "train"))
        if 0.5 < ratio < 2:
            break
    assert 0.5 < ratio < 2
    capsys.readouterr()


def test_a_budget_ends_the_estimate_where_it_ends_the_stage_and_no_weight_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # so few rows that the miniature asks them all, whatever the machine's mood: how many it asks changes their mean length
    Path("r.yaml").write_text(DRAWING.format(name="b", method="dapo").replace("batch_rows: 16", "batch_rows: 4"), encoding="utf-8")
    policies: list[Any] = []
    load = module.load_policy
    monkeypatch.setattr(module, "load_policy", lambda *given, **named: policies.append(load(*given, **named)) or policies[-1])
    more = ["stages.rl.train.steps=400", "stages.rl.rollouts.screen={samples: 4}"]
    whole = estimate("r.yaml", more)["stages"][1]
    limit = sum(p["tokens"] for p in whole["phases"] if p["name"] != "screen") // 4
    part = estimate("r.yaml", [*more, f"stages.rl.budget.tokens={limit}"])["stages"][1]
    spent = sum(p["tokens"] for p in part["phases"])
    assert spent == pytest.approx(limit, rel=0.02) and "budget.tokens ends the stage" in phases(part)["train"]["assumed"]
    assert phases(part)["screen"]["tokens"] == phases(whole)["screen"]["tokens"]
    screen, drawn = phases(whole)["screen"], phases(whole)["rollouts"]
    assert screen["tokens"] == pytest.approx(drawn["tokens"] * 256 * 4 / (400 * 4 * 8), rel=0.01)
    fresh = load("spark", dtype="float32", probe=False).model
    assert policies and all(torch.equal(a, b) for p in policies for a, b in zip(p.model.parameters(), fresh.parameters()))


def test_completions_are_as_long_as_what_an_earlier_stage_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(miniature, "PROBE_S", 0.2)
    text = DRAWING.format(name="t", method="dapo").replace(
        "stages:\n",
        "stages:\n  - {name: sft, method: sft, data: {task: sums, levels: [4, 5], rows: 64}, train: {steps: 1, batch_rows: 8, learning_rate: 1.0e-5}}\n",
    )
    Path("r.yaml").write_text(text, encoding="utf-8")
    found = phases(estimate("r.yaml")["stages"][2])["rollouts"]
    recipe = load("r.yaml").recipe
    policy = load_policy("spark", dtype="float32", probe=False)
    rows = module._Dry(recipe, lambda text: None)._items(recipe.stages[1])
    mean = sum(1 + len(policy.tokenizer.encode(i.rationale, add_special_tokens=False)) for i in rows) / len(rows)
    assert f"completions of {mean:.1f} tokens, as the rows that an earlier stage learns" in found["assumed"]
    drawn = 4 * 16 * 8 * mean
    assert drawn < found["tokens"] < drawn + 4 * 16 * 16  # the prompts besides


def test_what_cannot_be_tried_in_miniature_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(miniature, "PROBE_S", 0.2)
    Path("r.yaml").write_text(DRAWING.format(name="c", method="dapo").replace("rewards: task", "rewards: {name: length_cap, cap: 1000}"), encoding="utf-8")
    with pytest.raises(MachineError, match=r"stage 'rl' cannot be tried.*no completion of the miniature has a gradient"):
        estimate("r.yaml")


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("ppo", ["stages.rl.critic={pretrain_steps: 3, prune: {chunk_tokens: 8}}", "stages.rl.rollouts.updates=2"]),
        ("grpo", ["stages.rl.rollouts={refill: 2, overlong_cushion: 16, old_logprobs: trainer, max_new_tokens: 32}"]),
        ("{name: mixer, warmup: 3}", []),
        ("trpo", ["stages.rl.train.learning_rate=1"]),
        ("mrt", []),
        ("astar_po", []),
    ],
)
def test_methods_with_more_than_a_policy_are_tried_too(method: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A critic, a refill, given tokens, a step of its own, gold completions, values before the first round; no weight moves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(miniature, "PROBE_S", 0.1)
    policies: list[Any] = []
    load = module.load_policy
    monkeypatch.setattr(module, "load_policy", lambda *given, **named: policies.append(load(*given, **named)) or policies[-1])
    Path("r.yaml").write_text(DRAWING.format(name="m", method=method), encoding="utf-8")
    found = phases(estimate("r.yaml", more)["stages"][1])
    assert found["rollouts"]["tokens"] > 0 and found["train"]["tokens"] > 0 and found["train"]["seconds"] > 0
    if method == "astar_po":  # eight of each of the 64 prompts of four rounds, which then draw one of each
        assert found["screen"]["tokens"] == pytest.approx(8 * found["rollouts"]["tokens"], rel=0.01)
    fresh = load("spark", dtype="float32", probe=False).model
    assert policies and all(torch.equal(a, b) for p in policies for a, b in zip(p.model.parameters(), fresh.parameters()))


def test_a_stage_of_stored_completions_is_tried_with_its_critic_and_its_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(miniature, "PROBE_S", 0.01)  # a part of a batch is all that is tried
    rows = [json.dumps({"prompt": f"{i}+1", "completion": f"{i} and 1\n#### {i + 1}", "reward": i % 2}) for i in range(64)]
    Path("rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    Path("r.yaml").write_text(
        "burnish: 1\nname: o\nmodel: spark\nstages:\n  - name: oreo\n    method: {name: oreo, level: step}\n    data: {file: rows.jsonl}\n"
        "    train: {steps: 4, batch_rows: 64, learning_rate: 1.0e-5}\n", encoding="utf-8",
    )  # fmt: skip
    found = estimate("r.yaml")["stages"][1]
    assert phases(found)["train"]["executed_flops"] > 2 * phases(found)["train"]["useful_flops"] > 0
