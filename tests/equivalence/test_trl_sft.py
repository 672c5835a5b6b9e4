"""TRL 1.16's SFTTrainer replayed from its fixture (trl_sft/README.md): the same ids in the same order through our own loop.

Loss and gradient norm of step 1, losses of 20 steps, and where the weights ended, full and LoRA, tied and untied.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from burnish.core.records import Rendered
from burnish.core.runs import StageFolder, read_jsonl
from burnish.core.stop import Stop
from burnish.data.chat import Prepared
from burnish.data.sampler import Sampler
from burnish.maths.logprobs import weighted_nll
from burnish.methods.supervised import Supervised
from burnish.models.adapters import lora
from burnish.models.load import load_policy
from burnish.models.policy import Policy
from burnish.train.loop import fit
from burnish.train.memory import Memory
from burnish.train.schedules import SCHEDULES

HERE = Path(__file__).parent / "trl_sft"
CASES = sorted(p.parent.name for p in HERE.glob("*/run.json"))


def rows_of(batches: list[Any]) -> list[Rendered]:
    """Every row TRL collated, in its order, without the padding."""
    rows = []
    for step in batches:
        for micro in step:
            for ids, labels, n in zip(micro["input_ids"], micro["labels"], micro["lengths"], strict=True):
                assert all(x in (-100, i) for x, i in zip(labels[:n], ids[:n]))
                rows.append(Rendered(tuple(ids[:n]), tuple(x != -100 for x in labels[:n]), f"row {len(rows)}"))
    return rows


def start(case: str, known: dict[str, Any]) -> Policy:
    policy = load_policy(HERE / known["model"], dtype="float32")
    folder = HERE / case / "adapter_initial"
    if not folder.exists():
        return policy
    from peft import set_peft_model_state_dict

    config = json.loads((folder / "adapter_config.json").read_text())
    policy.requires_grad_(False)
    policy = lora(policy, rank=config["r"], alpha=config["lora_alpha"])
    set_peft_model_state_dict(policy.model, load_file(folder / "adapter_model.safetensors"))
    return policy


def plain(name: str) -> str:
    """peft's saved names leave out the adapter's."""
    return name.replace(".default.", ".")


def gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """norm(ours - theirs) / norm(theirs) over all tensors together."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[k].double() - theirs[k].double()).square().sum()) for k in theirs)
    return math.sqrt(difference / sum(float(t.double().square().sum()) for t in theirs.values()))


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_of_trl(case: str, tmp_path: Path, record_property: Any) -> None:
    known = json.loads((HERE / case / "run.json").read_text())
    rows = rows_of(json.loads((HERE / known["batches"]).read_text()))
    policy, how = start(case, known), known["optimiser"]
    batch_rows = len(rows) // len(known["steps"])
    method = Supervised(
        Prepared(tuple(rows), None, {}, 0, 0, 0), (), Sampler(len(rows), batch_rows, sequential=True), len(known["steps"]), "token_mean"  # type: ignore[arg-type]
    )

    work = next(method.batches(0))
    method.prepare(policy, work)
    for micro in work.batch.split(64):
        objective, _ = method.objective(work, micro)
        policy(micro, objective).loss.backward()
    gradient = {plain(n): p.grad for n, p in policy.trainable().items() if p.grad is not None}
    first = gap(gradient, load_file(HERE / case / "first_gradient.safetensors"))
    policy.zero_grad()

    settings = SimpleNamespace(
        learning_rate=how["learning_rate"], adam_beta1=how["adam_beta1"], adam_beta2=how["adam_beta2"],
        adam_epsilon=how["adam_epsilon"], weight_decay=how["weight_decay"], clip_norm=how["max_grad_norm"],
        checkpoint_every=None, keep_checkpoints=1, validate_every=None, max_skipped_steps=0,
    )  # fmt: skip
    before = {plain(n): p.detach().clone() for n, p in policy.trainable().items()}
    fit(policy, method, settings, StageFolder(tmp_path / "01-sft").make(), schedule=SCHEDULES[how["schedule"]], memory=Memory.fixed(64), stop=Stop())
    ours, theirs = list(read_jsonl(tmp_path / "01-sft/metrics.jsonl")), known["steps"]

    assert [r["label_tokens"] for r in ours] == [s["label_tokens"] for s in theirs]
    assert [r["lr"] for r in ours] == pytest.approx([s["learning_rate"] for s in theirs], rel=1e-9)
    loss = abs(ours[0]["loss"] / theirs[0]["loss"] - 1)
    norm = abs(ours[0]["grad_norm"] / theirs[0]["grad_norm"] - 1)
    losses = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True))
    final = load_file(HERE / case / "final.safetensors")
    moved = gap(
        {plain(n): p.detach() - before[plain(n)] for n, p in policy.trainable().items()},
        {n: final[n] - before[n] for n in before},
    )
    record_property("measured", f"TRL {case}: step-1 loss {loss:.1e}, gradient norm {norm:.1e}, gradient {first:.1e}, 20 losses {losses:.1e}, dtheta {moved:.1e}")
    assert loss <= 1e-5 and norm <= 1e-4 and first <= 1e-4
    assert losses <= 2e-5  # tighter than was asked (1e-3): another beta2, or no clipping, moves these by about 1e-4
    assert moved <= 2e-3


def test_the_fixture_notices_another_average(tmp_path: Path) -> None:
    """A mean of sequence means in place of the token mean is not what TRL computes."""
    known = json.loads((HERE / "full/run.json").read_text())
    rows = rows_of(json.loads((HERE / known["batches"]).read_text()))
    policy = start("full", known)
    method = Supervised(Prepared(tuple(rows), None, {}, 0, 0, 0), (), Sampler(len(rows), 8, sequential=True), 1, "sequence_mean")  # type: ignore[arg-type]
    work = next(method.batches(0))
    method.prepare(policy, work)
    loss = 0.0
    for micro in work.batch.split(10_000):
        loss += float(policy(micro, weighted_nll(work.columns["weight"][micro.items])).loss.detach())
    assert abs(loss / known["steps"][0]["loss"] - 1) > 1e-4
