"""A resolved recipe's stage to live objects: data rendered, the method built. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from burnish.config.contradictions import draws
from burnish.config.schema import Recipe, Rollouts, Stage
from burnish.core.records import Rendered
from burnish.core.seeds import derive
from burnish.core.table import describe_row, load_row
from burnish.data.chat import ChatFormat, Prepared, preview
from burnish.material import StageMaterial, read_sources
from burnish.maths.policy_gradient import Setting, override
from burnish.methods.policy_gradient import build as build_policy_gradient
from burnish.methods.rounds import all_dead
from burnish.models.adapters import merge
from burnish.models.policy import Policy
from burnish.rewards.build import build as build_rewards
from burnish.train.loop import Guard, State
from burnish.train.memory import Memory
from burnish.train.method import Method

PREVIEWED = 6


@dataclass
class Built:
    """A stage ready to train."""

    recipe: Recipe
    stage: Stage
    method: Any
    schedule: Callable[[int, int], float]
    summary: Mapping[str, Any]
    mask_view: Sequence[Any]

    @property
    def validation(self) -> Sequence[Rendered] | None:
        return self.method.validation or None

    def adapt(self, policy: Policy) -> Policy:
        """The policy this stage trains: as it is, or with the adapter the recipe asks for, seeded."""
        adapter = self.stage.adapter
        policy.requires_grad_(True)
        if adapter is None:
            return policy
        torch.manual_seed(derive(self.recipe.seed, "adapter", self.stage.name))
        params = {k: v for k, v in adapter.params.items() if k != "save"}
        policy.requires_grad_(False)
        return load_row("adapter", adapter.name)(policy, **params)

    def settle(self, policy: Policy) -> Policy:
        """What the stage leaves: the adapter, or with `save: merged` the merged model."""
        if policy.adapted and self.stage.adapter is not None and self.stage.adapter.params.get("save") == "merged":
            return merge(policy)
        return policy

    def memory(self, decisions: dict[str, Any], written: Callable[[], None] = lambda: None) -> Memory:
        """How large a micro-batch may be: decided at the first step and kept in `decisions`, or replayed from them."""
        train, name = self.stage.train, f"memory.{self.stage.name}"

        def record(decision: Mapping[str, Any]) -> None:
            decisions[name] = dict(decision)
            written()

        limit = None if train.memory_bytes is None else int(train.memory_bytes)
        memory = Memory(train.micro_tokens, train.checkpointing, limit, self.summary["longest"], record)
        return memory.replay(decisions[name]) if name in decisions else memory

    @property
    def guards(self) -> list[Guard]:
        """Reasons of the stage's own to stop."""
        limit = self.stage.rollouts and self.stage.rollouts.stop_after_dead_rounds
        return [partial(all_dead, limit)] if limit else []

    def validate(self, policy: Policy, memory: Memory, state: State) -> Mapping[str, Any]:
        """The held-out loss, for the loop."""
        found, flops = self.method.held_out(policy, memory.plan(state.step).micro_tokens)
        labels = sum(n for _, n in found)
        state.ledger.count("validation", label_tokens=labels, stream_tokens=sum(len(r.ids) for r in self.method.validation), executed_flops=flops)
        return {"loss": sum(v for v, _ in found) / labels, "label_tokens": labels}

    def header(self, policy: Policy) -> str:
        """What will happen, in one paragraph."""
        data, train, shape = self.summary, self.stage.train, policy.shape
        trained = sum(p.numel() for p in policy.trainable().values())
        dropped = sum(data["dropped"].values())
        return (
            f"{self.stage.name}: {self.stage.method.name} on {data['rows']} rows ({data['label_tokens']} labels in {data['tokens']} tokens"
            f"{f', {dropped} rows dropped' if dropped else ''}), {self.method.total_steps} steps of {train.batch_rows} rows; "
            f"trains {trained:,} of {shape.parameters + shape.adapter_parameters:,} parameters"
        )

    def facts(self, state: State) -> dict[str, str]:
        """Rows of the model card."""
        return {
            "data": f"{self.summary['format']}: {self.summary['rows']} rows, {self.summary['label_tokens']} label tokens",
            "steps": f"{state.step} of {self.stage.train.batch_rows} rows",
            "learning rate": f"{self.stage.train.learning_rate:g}, {self.stage.train.schedule.name}",
            "cost": f"{state.ledger.tokens} tokens, {state.ledger.flops:.3g} FLOPs executed",
            "seed": str(self.recipe.seed),
        }


def build_stage(recipe: Recipe, stage: Stage, policy: Policy) -> Built:
    """Read and render a stage's data with the model's tokenizer. Raises DataError, ConfigError."""
    drawing = draws(describe_row("method", stage.method.name))
    rows = read_sources(stage.data, recipe.seed, "prompt" if drawing else "completion")
    material = StageMaterial(recipe, stage, rows, ChatFormat(policy.tokenizer), policy.context)
    method = method_of(material)
    prepared: Prepared = method.prepared  # type: ignore[attr-defined]
    schedule = partial(load_row("schedule", stage.train.schedule.name), **stage.train.schedule.params)
    summary = {
        "rows": len(prepared.rows), "validation_rows": len(method.validation), "dropped": prepared.dropped.counts,  # type: ignore[attr-defined]
        "notices": rows.notices | dict(prepared.notices), "tokens": prepared.tokens, "label_tokens": prepared.label_tokens, "longest": prepared.longest,
        "format": rows.format, "sources": rows.sources,
    }  # fmt: skip
    view = [{"where": r.where, "tokens": preview(r, policy.tokenizer)} for r in spread(prepared.rows, PREVIEWED)]
    return Built(recipe, stage, method, schedule, summary, view)


def method_of(material: StageMaterial) -> Method:
    """The stage's method: a row that builds itself, or a point of the policy-gradient algebra with the user's own axes."""
    stage = material.stage
    row: Any = load_row("method", stage.method.name)
    if not isinstance(row, Setting) and "rollouts" not in describe_row("method", stage.method.name).inputs:
        return row(material, **stage.method.params)
    rewards, rollouts = build_rewards(stage.rewards or (), None), stage.rollouts or Rollouts()
    if not isinstance(row, Setting):
        return row(material, rewards, rollouts, **stage.method.params)
    published = {p.name: p.default for p in describe_row("method", stage.method.name).parameters}
    yours = {k: tuple(v) if isinstance(v, list) else v for k, v in stage.method.params.items() if v != published[k]}
    return build_policy_gradient(override(row, **yours), material, rewards, rollouts, stage.critic)


def spread(rows: Sequence[Rendered], n: int) -> list[Rendered]:
    """`n` rows from the first to the last, so that every source of a stage is likely among them."""
    return [rows[i * (len(rows) - 1) // max(1, n - 1)] for i in range(n)] if len(rows) > n else list(rows)
