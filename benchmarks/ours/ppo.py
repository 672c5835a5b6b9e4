"""burnish's PPO step, as a run does it: rollouts, values and reference of the round, `train.loop.one_step`.

    {"do": "prepare", "model": FOLDER, "group": G, "most": N, "kl_coef": ..., "threads": 2}
    {"do": "step", "prompts": [[...]], "lengths": [...], "given": [[...]] or null}
        -> {"seconds": S, "samples": N, "loss": L, "value_loss": V, "grad_norm": G, "lengths": [...], FLOPs}

The row `ppo` with the critic a recipe gets without a `critic` block: a value head on the policy's rows. Every completion
ends at its own length, as in benchmarks/ours/rollout.py; `given` are completions to learn from in place of sampled ones.
The reward is benchmarks/ppo.py's, without the processes that a user's own function would run in.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from benchmarks.ours.rollout import end_as_told
from benchmarks.ppo import LEARNING_RATE, reward_of
from benchmarks.protocol import BEGAN, Answer, serve, versions

held: dict[str, Any] = {}


class InOrder:
    """A sampler whose every batch is all of the prompts, in order."""

    def __init__(self, rows: int) -> None:
        self.batch_rows = rows

    def batch(self, step: int) -> range:
        return range(self.batch_rows)


class Evenness:
    """`rewards.scoring.Rewards` with one component that needs no process."""

    cut, components, process, seconds = None, (), False, 0.0

    def score(self, prompts: Any, completions: Any, columns: Any, groups: Any = None) -> Any:
        from burnish.core.records import Scored

        found = [Scored(reward_of(ids)) for ids in columns["completion_ids"]]
        return SimpleNamespace(components={"even": found}, total=found, stats={"total": {}, "warnings": ()})

    def close(self) -> None: ...


def prepare(*, model: str, group: int, most: int, kl_coef: float, threads: int) -> Answer:
    import torch

    from burnish.models.load import load_policy
    from burnish.train.loop import State
    from burnish.train.memory import Memory

    imported = time.perf_counter()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    policy = load_policy(model)
    policy.requires_grad_(True)
    end_as_told(held)
    held.update(policy=policy, group=group, most=most, kl_coef=kl_coef, state=State(), memory=Memory())
    held["settings"] = SimpleNamespace(learning_rate=LEARNING_RATE, max_skipped_steps=0)
    return {
        "import_seconds": imported - BEGAN, "dtype": str(policy.dtype).removeprefix("torch."), "trained": policy.shape.parameters,
        "versions": versions("torch", "transformers"),
    }  # fmt: skip


def begin_stage(prompts: Sequence[Sequence[int]]) -> None:
    """The method and its optimiser, once the first prompts say how many a round has."""
    from burnish.config.schema import Critic
    from burnish.core.records import Sampling
    from burnish.maths.policy_gradient import override
    from burnish.maths.settings import POLICY_GRADIENT
    from burnish.methods.curriculum import Prompts
    from burnish.methods.policy_gradient import PolicyGradient
    from burnish.methods.rounds import Rounds
    from burnish.train.optim import Optimiser

    policy = held["policy"]
    order: Any = Prompts(InOrder(len(prompts)))  # type: ignore[arg-type]
    rounds: Any = Rounds(
        questions_of(prompts), Evenness(), Sampling(max_new_tokens=held["most"]), order,  # type: ignore[arg-type]
        group_size=held["group"], seed=0, end_ids=(), greedy=False,
    )  # fmt: skip
    setting = override(POLICY_GRADIENT["ppo"], kl_coef=held["kl_coef"])
    method: Any = PolicyGradient(setting, rounds, prompts=order, prepared=None, updates=1, passes=1, total_steps=10**6, critic=Critic())
    method.start(policy, None, lambda: None)
    held.update(method=method, optimiser=Optimiser(policy, learning_rate=LEARNING_RATE, beside=method.beside(LEARNING_RATE)))


def questions_of(prompts: Sequence[Sequence[int]]) -> list[Any]:
    from burnish.methods.rounds import Question

    return [Question(tuple(p), "", {}, str(i)) for i, p in enumerate(prompts)]


def as_given(completions: list[list[int]]) -> Any:
    """What stands in for sampling: these completions, with the engine's own log-probs of them."""
    from burnish.core.records import Span, Trajectory

    def sample(engine: Any, nodes: Any, sampling: Any, keys: Any) -> list[Any]:
        below = engine.prefill_many(completions, nodes)
        scores = engine.score(below)
        made = [
            Trajectory(
                str(i), node.id, node.path + tuple(c), tuple(s), engine.weights_version, {},
                (Span("prompt", 0, node.end), Span("completion", node.end, node.end + len(c))), "length",
            )
            for i, (node, c, s) in enumerate(zip(nodes, completions, scores))
        ]  # fmt: skip
        for node in below:
            engine.free(node)
        return made

    return sample


def step(*, prompts: list[list[int]], lengths: list[int], given: list[list[int]] | None = None) -> Answer:
    from burnish.train.loop import one_step
    from burnish.train.schedules import constant

    begin = time.perf_counter()
    distinct = prompts[:: held["group"]]
    if "method" not in held:
        begin_stage(distinct)
    method, state, policy = held["method"], held["state"], held["policy"]
    held["lengths"], method.questions = lengths, questions_of(distinct)
    method.rounds.questions = method.questions
    method.rounds.sample = None if given is None else as_given(given)
    before = flops_of(state)
    work = next(method.batches(state.step))
    row = one_step(policy, method, held["optimiser"], held["settings"], constant, held["memory"], state, work, policy.shape)
    after = flops_of(state)
    drawn = [s for q in method._round.groups for s in q]
    return {
        "seconds": time.perf_counter() - begin, "samples": len(drawn), "tokens": row["label_tokens"], "loss": row["loss"],
        "value_loss": row["value_loss"], "grad_norm": row["grad_norm"], "lengths": [len(s.tokens) for s in drawn],
        "plan": str(held["memory"].plan(state.step)), **{name: after[name] - before[name] for name in after},
    }  # fmt: skip


def flops_of(state: Any) -> dict[str, int]:
    return {name: sum(phase.get(name, 0) for phase in state.ledger.counted.values()) for name in ("useful_flops", "executed_flops")}


if __name__ == "__main__":
    sys.exit(serve(prepare, step))
