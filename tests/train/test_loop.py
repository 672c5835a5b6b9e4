"""The loop: exact resume, guards before any update, budgets, signals, and nothing done counted as nothing done."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from burnish.core.errors import ConfigError, DivergedError, Interrupted, StorageError
from burnish.core.records import Rendered
from burnish.core.runs import StageFolder, read_json, read_jsonl
from burnish.core.stop import Stop
from burnish.data.chat import Prepared
from burnish.data.sampler import Sampler
from burnish.methods.supervised import Supervised
from burnish.models.policy import Policy
from burnish.train import checkpoint
from burnish.train.loop import State, fit
from burnish.train.memory import Memory
from burnish.train.schedules import linear
from tests.forest.tiny import tiny

SETTINGS = SimpleNamespace(
    learning_rate=1e-2, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.0, clip_norm=1.0,
    checkpoint_every=2, keep_checkpoints=2, validate_every=None, max_skipped_steps=2,
)  # fmt: skip


def rows(n: int = 24) -> tuple[Rendered, ...]:
    made = []
    for i in range(n):
        ids = tuple(3 + (5 * i + j * j) % 90 for j in range(4 + i % 5))
        made.append(Rendered(ids, tuple(j > 1 for j in range(len(ids))), f"row {i}"))
    return tuple(made)


def method(steps: int, weights: str = "token_mean") -> Supervised:
    data = rows()
    prepared = Prepared(data, None, {}, 0, 0, 0)  # type: ignore[arg-type]
    return Supervised(prepared, data[:4], Sampler(len(data), 6, seed=3), steps, weights)


def policy(dtype: torch.dtype = torch.float32) -> Policy:
    return Policy(tiny("llama", dtype=dtype), SimpleNamespace(eos_token_id=2))


def train(folder: Path, steps: int, *, on: Policy | None = None, settings: Any = SETTINGS, **more: Any) -> tuple[Policy, State]:
    trained = on or policy()
    options: dict[str, Any] = {"schedule": linear, "memory": Memory.fixed(1000), "stop": Stop()} | more
    state = fit(trained, method(steps), settings, StageFolder(folder).make(), **options)
    return trained, state


def weights(p: Policy) -> dict[str, torch.Tensor]:
    return {n: x.detach().clone() for n, x in p.model.named_parameters()}


def same(a: Policy, b: Policy) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    whole, _ = train(tmp_path / "00-whole", 8, on=policy(dtype))

    def stop_at_five(state: State, row: Any) -> str | None:
        return "test" if state.step == 5 else None

    _, first = train(tmp_path / "00-cut", 8, on=policy(dtype), guards=[stop_at_five])
    assert first.stopped_by == "test" and first.step == 5
    resumed, state = train(tmp_path / "00-cut", 8, on=policy(dtype), resume=True)
    assert state.step == 8 and same(whole, resumed)
    assert (tmp_path / "00-whole/metrics.jsonl").read_bytes() == (tmp_path / "00-cut/metrics.jsonl").read_bytes()
    counted = [read_json(tmp_path / n / "ledger.json")["counted"] for n in ("00-whole", "00-cut")]
    assert counted[0] == counted[1] and counted[0]["train"]["label_tokens"] > 0


def test_training_learns_and_micro_batches_cannot_change_it(tmp_path: Path) -> None:
    a, _ = train(tmp_path / "00-a", 12)
    b, _ = train(tmp_path / "00-b", 12, memory=Memory.fixed(20))
    losses = [r["loss"] for r in read_jsonl(tmp_path / "00-a/metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.5
    for x, y in zip(weights(a).values(), weights(b).values()):
        assert (x - y).norm() <= 1e-4 * x.norm()
    for x, y in zip(read_jsonl(tmp_path / "00-a/metrics.jsonl"), read_jsonl(tmp_path / "00-b/metrics.jsonl")):
        assert x["label_tokens"] == y["label_tokens"] and math.isclose(x["loss"], y["loss"], rel_tol=1e-4)


def test_what_a_router_adds_is_logged_beside_the_loss_it_is_part_of(tmp_path: Path) -> None:
    words = SimpleNamespace(eos_token_id=2)
    on = Policy(tiny("mixtral", output_router_logits=True, router_aux_loss_coef=0.5), words)
    train(tmp_path / "00-on", 2, on=on, memory=Memory.fixed(20))
    train(tmp_path / "00-off", 2, on=Policy(tiny("mixtral"), words), memory=Memory.fixed(20))
    with_term, without = (list(read_jsonl(tmp_path / f / "metrics.jsonl")) for f in ("00-on", "00-off"))
    assert all("router_loss" not in row for row in without)
    first = with_term[0]
    assert 0.5 * 2 * 0.9 < first["router_loss"] < 0.5 * 4  # coefficient times top_k = 2 where routing is even, 4 at worst
    assert math.isclose(first["loss"], without[0]["loss"] + first["router_loss"], rel_tol=1e-5)
    assert with_term[1]["loss"] - with_term[1]["router_loss"] != without[1]["loss"]  # it has moved the weights


def poisoned(at: set[int]) -> Policy:
    """Its loss is not a number in these steps."""
    p = policy()
    forward, calls = p.forward, [0]

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        out = forward(*args, **kwargs)
        if calls[0] in at:
            out = type(out)(out.loss * math.nan, out.logprobs, out.executed_flops)
        return out

    p.forward = broken  # type: ignore[method-assign]
    return p


def test_a_step_that_is_not_finite_updates_nothing_and_is_counted(tmp_path: Path) -> None:
    p = poisoned({1})
    before = weights(p)
    seen: list[dict[str, torch.Tensor]] = []
    _, state = train(tmp_path / "00-x", 2, on=p, on_step=lambda row, timing, s: seen.append(weights(p)))
    assert all(torch.equal(seen[0][n], before[n]) for n in before)
    assert not all(torch.equal(seen[1][n], before[n]) for n in before)
    assert state.skipped_steps == 1
    first, second = read_jsonl(tmp_path / "00-x/metrics.jsonl")
    assert first["loss"] is None and first["grad_norm"] is None and first["skipped_steps"] == 1
    assert second["loss"] > 0


def test_too_many_in_a_row_stop_the_run_and_name_the_rows(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"row \d+.*3 times in a row") as caught:
        train(tmp_path / "00-x", 9, on=poisoned(set(range(2, 99))))
    assert caught.value.exit_code == 5
    tensors = checkpoint.latest(StageFolder(tmp_path / "00-x"))
    assert tensors is not None and all(bool(torch.isfinite(t.float()).all()) for t in tensors.tensors.values())


def test_no_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no step to do"):
        train(tmp_path / "00-x", 0)


def test_a_signal_finishes_the_step_saves_and_says_so(tmp_path: Path) -> None:
    with Stop() as stop:
        def interrupt(row: Any, timing: Any, state: State) -> None:
            if state.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted) as caught:
            train(tmp_path / "00-x", 8, stop=stop, on_step=interrupt)
    assert caught.value.exit_code == 143
    resumed, state = train(tmp_path / "00-x", 8, resume=True)
    whole, _ = train(tmp_path / "00-y", 8)
    assert state.step == 8 and same(whole, resumed)


def test_a_damaged_checkpoint_is_passed_over_with_a_notice(tmp_path: Path) -> None:
    train(tmp_path / "00-x", 4)
    newest = tmp_path / "00-x/checkpoint-4/state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    said: list[str] = []
    resumed, _state = train(tmp_path / "00-x", 4, resume=True, say=said.append)
    assert any("checkpoint-4 is damaged" in s for s in said) and any("after step 2" in s for s in said)
    whole, _ = train(tmp_path / "00-y", 4)
    assert same(whole, resumed)


def test_a_checkpoint_of_a_newer_burnish_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "00-x", 2)
    path = tmp_path / "00-x/checkpoint-2/manifest.json"
    path.write_text(json.dumps(read_json(path) | {"schema": 99}))
    with pytest.raises(StorageError, match="newer burnish"):
        train(tmp_path / "00-x", 4, resume=True)


def test_retention_keeps_the_newest_and_touches_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "00-x/checkpoint-mine").mkdir(parents=True)
    train(tmp_path / "00-x", 8)
    names = sorted(p.name for p in (tmp_path / "00-x").glob("checkpoint-*"))
    assert names == ["checkpoint-6", "checkpoint-8", "checkpoint-mine"]


def test_no_room_names_the_bytes_and_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "00-x", 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"needs .* MB and 0 MB are free") as caught:
        train(tmp_path / "00-x", 4, resume=True)
    assert caught.value.exit_code == 7
    monkeypatch.undo()
    found = checkpoint.latest(StageFolder(tmp_path / "00-x"))
    assert found is not None and found.step == 2
    assert not list((tmp_path / "00-x").glob("*.tmp-*"))
