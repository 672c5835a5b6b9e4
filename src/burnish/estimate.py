"""What a run would take, before it is run: FLOPs, tokens, peak memory and time, stage by stage.

Counts come from the data and the ledger's formulas. Speeds and bytes are measured here, each phase once in miniature: the
model is loaded, a few answers are drawn, and the loop takes a few steps at a learning rate of 0, which leaves every weight
as it was. Time is then executed FLOPs over the speed of that phase, and the speed is given as a share of this machine's
matrix product, so that the figure can be carried to another day or machine.

Memory is what the process holds above what importing its libraries takes. Everything the miniature held in full is read
off the process; what a run holds more of is added from the sizes of its tensors.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from burnish import miniature
from burnish.build import Built, build_stage
from burnish.config.check import check
from burnish.config.contradictions import draws
from burnish.config.load import load
from burnish.config.schema import Budget, Recipe, Rollouts, Stage
from burnish.core.errors import MachineError
from burnish.core.ledger import forward_flops
from burnish.core.machine import resident_bytes
from burnish.core.records import ModelShape, Spend
from burnish.core.seeds import derive
from burnish.core.table import describe_row, load_row
from burnish.data.tasks.base import Item, Task, items
from burnish.engines.local.arena import KEYS_STEP, Arena
from burnish.engines.local.engine import LocalEngine
from burnish.engines.local.rollout import MEMBERS_PER_ROW
from burnish.evals.accuracy import deciding, prompts_of
from burnish.judges import HeldOut, Questions, judges
from burnish.machine import gflops
from burnish.miniature import Taken, count_stage, few_steps, peak_since, second_a_byte, two_rounds
from burnish.models.load import load_policy, resolve
from burnish.models.policy import Policy
from burnish.search.base import strategy
from burnish.train.memory import bytes_of

Say = Callable[[str], None]
TOKEN_BYTES = 24 + 8 + 8 + 28  # of one sampled token in a trajectory: a float, two places in tuples, an int
TRAJECTORY_BYTES = 1600  # of a trajectory besides: its record, spans, cost and text (tracemalloc)


@dataclass
class Phase:
    """One part of a stage. gflops: executed FLOPs a second in the miniature; assumed: what could not be known."""

    name: str
    seconds: float
    tokens: int = 0
    useful_flops: int = 0
    executed_flops: int = 0
    gflops: float | None = None
    efficiency: float | None = None
    assumed: str = ""


@dataclass
class StageEstimate:
    """One stage: its phases, and the items of its peak memory in bytes above the import baseline."""

    name: str
    phases: list[Phase] = field(default_factory=list[Phase])
    memory: dict[str, int] = field(default_factory=dict[str, int])
    plan: str = ""

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "plan": self.plan, "phases": [asdict(p) for p in self.phases], "memory": self.memory,
            "peak_bytes": self.peak_bytes, **_total(self.phases),
        }  # fmt: skip


def _total(phases: Sequence[Phase]) -> dict[str, Any]:
    names = ("tokens", "useful_flops", "executed_flops")
    return {"seconds": round(sum(p.seconds for p in phases), 3), **{n: sum(getattr(p, n) for p in phases) for n in names}}


def import_everything(model: str) -> None:
    """What a run imports on the way, the model's own module among it: memory above this is the run's."""
    import numpy  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM

    import burnish.pipeline
    import burnish.report.write  # noqa: F401

    where = resolve(model)
    if isinstance(where, Path) and not (where / "config.json").exists():
        return  # an adapter: its base is found when it is loaded
    config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    AutoModelForCausalLM._model_mapping.get(type(config), None)  # imports the module that defines it
    a = torch.randn(256, 256)
    torch.mm(a, a)
    torch.mm(a.to(torch.bfloat16), a.to(torch.bfloat16))  # the products' own libraries


def estimate(source: str | os.PathLike[str], overrides: Sequence[str] = (), say: Say = lambda text: None) -> dict[str, Any]:
    """The estimate as JSON. Raises what `run` would raise before its first step: ConfigError, DataError, MachineError ..."""
    resolved = load(source, overrides)
    check(resolved).refuse()
    return _Dry(resolved.recipe, say).run()


class _Dry:
    """One process's miniature of a run, in the order of the run."""

    def __init__(self, recipe: Recipe, say: Say) -> None:
        self.recipe, self.say = recipe, say
        import_everything(recipe.model)
        self.baseline = resident_bytes()

    def run(self) -> dict[str, Any]:
        recipe = self.recipe
        begin = time.perf_counter()
        policy = self._load()
        self.load_s = time.perf_counter() - begin
        if policy.device.type != "cpu":
            raise MachineError("estimates are made for the CPU only so far", where="burnish estimate", remedy="type --set device=cpu")
        self.tokenizer = policy.tokenizer
        self.weights = bytes_of([*policy.model.parameters(), *policy.model.buffers()])
        dtype = policy.dtype
        self.speed = {name: gflops(t) for name, t in (("float32", torch.float32), ("bfloat16", torch.bfloat16))}
        self.peak = self.speed["bfloat16" if dtype == torch.bfloat16 else "float32"]
        built = [build_stage(recipe, stage, policy) for stage in recipe.stages]
        every = judges(recipe, policy, built)
        base = StageEstimate("base", [Phase("load", self.load_s)])
        decoded: dict[str, _Decoded] = {}
        held = resident_bytes() - self.baseline
        top = held
        for judge in every:
            self.say(f"base/{judge.name}")
            if isinstance(judge, Questions):
                before = resident_bytes() - self.baseline
                decoded[judge.name] = self._decode(judge, policy)
                top = max(top, before + decoded[judge.name].grows)
                base.phases.append(self._answers(judge, decoded[judge.name], None))
            else:
                base.phases.append(self._likelihood(judge, policy))
        answers = top - held
        base.memory = {"weights": self.weights, "tokenizer, data and runtime": max(0, held - self.weights), "answers": answers}
        stages = [base]
        # in a run the base stays loaded beside what is judged after a stage
        for index, one in enumerate(built):
            self.say(one.stage.name)
            if index:
                policy = self._load()
            stages.append(self._stage(one, policy, every, decoded, held, answers, built[:index]))
            del policy
            gc.collect()
        phases = [p for stage in stages for p in stage.phases]
        total = _total(phases) | {"peak_bytes": max(stage.peak_bytes for stage in stages)}
        return {
            "schema": 1, "recipe": recipe.name, "model": recipe.model, "dtype": str(dtype).removeprefix("torch."),
            "machine": {"threads": torch.get_num_threads(), "gflops": {k: round(v, 1) for k, v in self.speed.items()}},
            "baseline_bytes": self.baseline, "stages": [stage.to_json() for stage in stages], "total": total,
        }  # fmt: skip

    def _load(self) -> Policy:
        return load_policy(self.recipe.model, dtype=self.recipe.dtype, device=self.recipe.device)

    def _rate(self, flops: float, seconds: float) -> dict[str, Any]:
        rate = flops / max(seconds, 1e-9) / 1e9
        return {"gflops": round(rate, 2), "efficiency": round(rate / self.peak, 4)}

    # ---- a stage ------------------------------------------------------------------------------------------------

    def _stage(
        self, built: Built, policy: Policy, every: Sequence[Any], decoded: dict[str, _Decoded], held: int, answers: int, before: Sequence[Built]
    ) -> StageEstimate:  # fmt: skip
        policy = built.adapt(policy)
        found, shape, train = StageEstimate(built.stage.name), policy.shape, built.stage.train
        begins = resident_bytes()
        drawn: _Drawn | None = None
        if draws(describe_row("method", built.stage.method.name)):
            drawn = self._drawn(built, policy, before)
            taken, work = drawn.taken, drawn.largest
            found.phases += drawn.phases
            rate = taken.flops / max(taken.seconds, 1e-9)
        else:
            taken = few_steps(built, policy)
            count, work = count_stage(built, taken.plan, shape)
            # the miniature's steps, less what they would take without a token: the moments are updated as often as ever
            rate = taken.flops / max(taken.seconds - taken.fixed_s, 1e-9)
            waste = taken.flops / taken.useful
            executed = count.useful_flops * waste
            seconds = executed / rate + built.method.total_steps * taken.fixed_s
            found.phases.append(Phase("train", seconds, count.tokens, count.useful_flops, int(executed), **self._rate(executed, seconds)))
        steps = self._within_budget(built, found.phases)
        validation = built.validation
        passes = 0
        if validation is not None and train.validate_every:
            passes = steps // train.validate_every + (steps % train.validate_every > 0)
            found.phases.append(self._forward("validation", validation, shape, passes, rate))
        saves = 1 if not train.checkpoint_every else steps // train.checkpoint_every + (steps % train.checkpoint_every > 0)
        written = saves * taken.checkpoint_bytes + taken.model_bytes
        found.phases.append(Phase("save", written * second_a_byte()))
        found.phases.append(Phase("load", self.load_s))
        names = built.stage.evaluate
        for judge in every:
            if names is None or judge.name in names:
                if isinstance(judge, Questions):
                    found.phases.append(self._answers(judge, decoded[judge.name], built, drawn))
                else:
                    found.phases.append(self._forward(judge.name, judge.method.validation, shape, 1, rate))
        # what the run's largest micro-batch holds beyond the miniature's, in the pieces that the allocator held
        pieces = taken.held / max(1, taken.tracked_activations)
        activations = taken.activations(work)
        more = max(0, activations - taken.tracked_activations)
        in_pieces = max(0, int(taken.grown - taken.tracked + more * max(0.0, pieces - 1)))
        again = max(0, taken.tracked - taken.grown)  # the steps found so much that loading had left free, as a run's will
        found.plan = str(taken.plan)
        training = {
            "weights": taken.holdings.weights, "masters": taken.holdings.masters, "gradients": taken.holdings.gradients,
            "moments": taken.holdings.moments, "activations and head": activations,
            **({"reference": drawn.reference, "rollouts": drawn.held} if drawn else {}),
            "kept by the allocator": in_pieces, "tokenizer, data and runtime": max(0, begins - self.baseline - taken.holdings.weights - again),
        }  # fmt: skip
        judged = {"weights": self.weights + taken.holdings.weights, "tokenizer, data and runtime": max(0, held - self.weights), "answers": answers}
        found.memory = max((training, judged), key=lambda items: sum(items.values()))
        return found

    def _within_budget(self, built: Built, phases: list[Phase]) -> int:
        """The steps that are taken before a budget of the stage ends it; what stands in `phases` is cut to them."""
        steps, budget = built.method.total_steps, built.stage.budget
        limits: list[tuple[float, str]] = []
        for key, field_ in (("tokens", "tokens"), ("flops", "executed_flops"), ("seconds", "seconds")):
            each = {p.name: getattr(p, field_) for p in phases}
            once = each.pop("screen", 0)  # before the first step
            if (limit := getattr(budget, key)) is not None and sum(each.values()):
                limits.append((max(0.0, limit - once) / sum(each.values()), key))
        share, key = min(limits, default=(1.0, ""))
        taken = max(1, min(steps, math.ceil(share * steps)))
        if taken < steps:
            for i, p in enumerate(phases):
                if p.name == "screen":
                    continue
                part = {n: int(getattr(p, n) * taken / steps) for n in ("tokens", "useful_flops", "executed_flops")}
                said = "; ".join(filter(None, [p.assumed, f"budget.{key} ends the stage after about {taken} of {steps} steps"]))
                phases[i] = replace(p, seconds=p.seconds * taken / steps, assumed=said, **part)
        return taken

    def _drawn(self, built: Built, policy: Policy, before: Sequence[Built]) -> _Drawn:
        """A stage that draws what it learns from: two rounds of it in miniature, then as many and as large as it has."""
        stage, method = built.stage, built.method
        rollouts = stage.rollouts or Rollouts()
        most = rollouts.max_new_tokens
        by_rounds = "rounds" in stage.method.params
        prompts = len(method.rounds.sampler.batch(0)) if by_rounds else stage.train.batch_rows
        per_round = 2 if by_rounds else rollouts.updates * rollouts.passes
        few = min(prompts, 2 * rollouts.updates)

        def smaller(asked: int, limit: int) -> Built:
            cushion = rollouts.overlong_cushion and min(limit, rollouts.overlong_cushion)
            block = rollouts.model_copy(update={"max_new_tokens": limit, "overlong_cushion": cushion, "curriculum": None, "screen": None, "partial": 0})
            train = stage.train.model_copy(update={"steps": 2 * per_round, "epochs": None, "learning_rate": 0.0})
            own = dict(stage.method.params)
            if by_rounds:  # what is kept costs as much as what is right
                own |= {"rounds": 2, "prompts": asked} | {name: -1e30 for name in ("threshold",) if name in own}
            else:
                train = train.model_copy(update={"batch_rows": asked})
            if "warmup" in own:  # as where nothing is given and all is drawn
                own |= {"warmup": 0, "period": 1, "fewer": 1 << 20}
            critic = stage.critic and stage.critic.model_copy(update={"pretrain_steps": 0})
            choice = stage.method.model_validate({"name": stage.method.name, **own})
            return build_stage(self.recipe, stage.model_copy(update={"rollouts": block, "critic": critic, "train": train, "method": choice, "budget": Budget()}), policy)

        def rate(asked: int, limit: int) -> float:
            rounds = smaller(asked, limit).method.rounds
            rounds.sample = None  # a critic that prunes is not there before the stage starts
            begin = time.perf_counter()
            return rounds.draw(policy, 0).spend.sampled_tokens / (time.perf_counter() - begin)

        rate(few, min(most, 8))  # the first product of a shape is slow
        affordable = 4 * miniature.PROBE_S * rate(few, min(most, 8))
        asked = int(min(prompts, max(few, affordable // (rollouts.group_size * most))))
        asked = max(rollouts.updates, asked // rollouts.updates * rollouts.updates)
        limit = int(min(most, max(8, affordable // (rollouts.group_size * asked))))
        mini = two_rounds(smaller(asked, limit), policy, per_round)
        known = limit == most
        length, why = (mini.length, "as the model's own before the stages") if known else (float(most), "every one as long as it may be")
        taught = next((s for b in before for s in b.stage.data if s.task in {o.task for o in stage.data} and s.task is not None), None)
        if taught is not None:
            texts = [i.rationale if taught.target == "rationale" else i.answer for i in self._items(stage)]
            length = min(float(most), 1 + sum(len(self.tokenizer.encode(t, add_special_tokens=False)) for t in texts) / len(texts))
            why = "as the rows that an earlier stage learns"
        rounds = stage.method.params["rounds"] if by_rounds else method.total_steps / per_round
        longer, larger = length / mini.length, prompts / asked
        times = rounds * larger * longer
        sampled = mini.sampled * times
        tokens = sampled + mini.scored * times + mini.prefill * rounds * larger
        bound = mini.samples * rounds * larger * most
        assumed = f"completions of {length:.1f} tokens, {why}; at most {most}, and then {bound:,.0f} sampled tokens in place of {sampled:,.0f}"
        if rollouts.refill:
            assumed += "; as many groups drawn again as the model's own before the stages"
        phases = [
            Phase("rollouts", mini.draw_s * times, int(tokens), int(mini.draw_useful * times), int(mini.draw_executed * times),
                  **self._rate(mini.draw_executed, mini.draw_s), assumed=assumed),
        ]  # fmt: skip
        if not by_rounds and method.beforehand:
            share = method.beforehand / (mini.samples * larger * rounds)
            screen = {n: int(getattr(phases[0], n) * share) for n in ("tokens", "useful_flops", "executed_flops")}
            phases.append(replace(phases[0], name="screen", seconds=phases[0].seconds * share, assumed="", **screen))
        # prompts stand in a tree once, or once a row
        question = sum(len(q.ids) for q in method.rounds.questions) / len(method.rounds.questions)
        members = 1 if by_rounds else rollouts.group_size
        more = (question + members * length) / (question + members * mini.length) * (1 if by_rounds else larger)
        steps = method.total_steps
        taken, live = mini.taken, "as many completions with a gradient as the model's own before the stages had"
        if stage.critic and stage.critic.pretrain_steps:
            live += f"; the critic's first {stage.critic.pretrain_steps} steps counted as the others"
        phases.append(
            Phase("train", steps * taken.seconds * more, int(steps * mini.tokens * more), int(steps * taken.useful * more), int(steps * taken.flops * more),
                  **self._rate(taken.flops, taken.seconds), assumed="" if by_rounds else live)
        )  # fmt: skip
        tokens_of, rows_of = taken.largest
        up = max(1.0, min(more, taken.plan.micro_tokens / tokens_of))
        return _Drawn(taken, phases, (int(tokens_of * up), int(rows_of * up)), length, mini.reference, int(mini.held * max(1.0, larger * longer)))

    def _items(self, stage: Stage) -> list[Item]:
        """Some questions of a stage's tasks, with their worked answers."""
        made: list[Item] = []
        for source in stage.data:
            if source.task is not None:
                task = cast(Task, load_row("task", source.task))
                made += items(task, source.fold, source.levels, min(source.rows or 0, 200), derive(self.recipe.seed, "data", source.task))
        return made

    # ---- evaluations --------------------------------------------------------------------------------------------

    def _likelihood(self, judge: HeldOut, policy: Policy) -> Phase:
        rows = judge.method.validation
        some = rows[: max(1, min(len(rows), 64))]
        before = judge.method.validation
        judge.method.validation = some
        try:
            begin = time.perf_counter()
            _, flops = judge.method.held_out(policy, 4096)
            took = time.perf_counter() - begin
        finally:
            judge.method.validation = before
        return self._forward(judge.name, rows, policy.shape, 1, flops / max(took, 1e-9))

    def _forward(self, name: str, rows: Sequence[Any], shape: ModelShape, passes: int, rate: float) -> Phase:
        """Scoring these rows, at a speed in FLOPs a second."""
        tokens, labels = sum(len(r.ids) for r in rows), sum(sum(r.trained) for r in rows)
        flops = passes * forward_flops(shape, tokens, labels, [(0, len(r.ids)) for r in rows])
        return Phase(name, flops / rate, passes * tokens, flops, flops, **self._rate(flops, flops / rate))

    def _decode(self, judge: Questions, policy: Policy) -> _Decoded:
        """Answer some of an eval's questions, by all its strategies: how long answers are, and how fast they come."""
        judged = judge.judged
        bound = [strategy(text) for text in dict.fromkeys(judged.strategies)]
        draws = [int(b.parameters.get("draws") or b.parameters.get("n") or 1) for b in bound if b.spec.name != "greedy"]
        each = (len(draws) < len(bound)) + max(draws, default=0)  # samples of a question: strategies share theirs
        temperatures = judged.temperature if isinstance(judged.temperature, tuple) and draws else ()
        choosing = len(judge.validation) * len(set(temperatures)) * deciding(bound).parameters.get("n", 1) / each

        def answer(questions: int, limit: int) -> tuple[Spend, float, int]:
            """(spend, seconds, growth in bytes) of so many questions, answers cut at `limit` tokens."""
            part = replace(judge, asked=judge.asked[:questions], validation=(), judged=judged.model_copy(update={"max_new_tokens": limit}))
            gc.collect()
            before, begin = resident_bytes(), time.perf_counter()
            with peak_since() as peak:
                result = part(policy, "base", lambda done, note="": None, lambda: None)
            return Spend(**result["spend"]), time.perf_counter() - begin, max(0, peak() - before)

        most, n = judged.max_new_tokens, len(judge.asked)
        few, short = min(n, 2), min(most, 8)
        answer(few, short)  # the first product of a shape is slow
        spend, took, _ = answer(few, short)
        # many rows at once are several times as fast as a few, and most answers end early
        affordable = 4 * miniature.PROBE_S * spend.sampled_tokens / took
        questions = int(max(few, min(n, affordable // (each * most))))
        limit = int(min(most, max(short, affordable // (each * questions))))
        half = max(1, questions // 2)
        sooner = answer(half, limit)[1] if half < questions < n else 0.0
        spend, took, grows = answer(questions, limit)
        per_question = (n + choosing) / questions
        # a step of decoding costs something however few rows it has: no more of them are taken while all rows find a place
        fixed = min(max(0.0, took - (took - sooner) / (questions - half) * questions), took) if sooner else 0.0
        rounds = max(1.0, (n + choosing) * each / (MEMBERS_PER_ROW * LocalEngine(policy).rows))
        length = spend.sampled_tokens / (questions * each)
        known = limit == most
        stretch = 1.0 if known else most / length
        return _Decoded(
            tokens=spend.sampled_tokens * per_question * stretch, length=length * stretch, known=known,
            useful_flops=spend.useful_flops * per_question * stretch, executed_flops=spend.executed_flops * per_question * stretch,
            seconds=((took - fixed) * per_question + fixed * rounds) * stretch,
            grows=grows + self._held_by_all(judge, policy, questions, each, length * stretch),
        )  # fmt: skip

    def _held_by_all(self, judge: Questions, policy: Policy, questions: int, each: int, length: float) -> int:
        """Bytes that answering all questions at once holds above answering some: keys, values and what was drawn."""
        engine = LocalEngine(policy)
        ids = [p.ids for p in prompts_of(judge.chat, judge.asked)]
        arenas = (Arena(), Arena())
        for arena, asked in zip(arenas, (ids, ids[:questions])):
            for one in dict.fromkeys(asked):
                arena.allocate(len(one))
        size = -(-(max(map(len, ids)) + min(judge.judged.max_new_tokens, 64)) // KEYS_STEP) * KEYS_STEP
        slots = [min(q * each, MEMBERS_PER_ROW * engine.rows, engine.tokens_held // size) for q in (len(ids), questions)]
        keys = min(arenas[0].spans.capacity, engine.tokens_held) - arenas[1].spans.capacity + (slots[0] - slots[1]) * size
        drawn = int((len(ids) - questions) * each * (length * TOKEN_BYTES + TRAJECTORY_BYTES))
        return max(0, keys) * engine.bytes_per_token * engine.shape.layers + drawn

    def _answers(self, judge: Questions, decoded: _Decoded, after: Built | None, drawn: _Drawn | None = None) -> Phase:
        """An eval: as long as the base's answers, or as the rows a stage learned from where it learned this task."""
        most = judge.judged.max_new_tokens
        longer, assumed = 1.0, "" if decoded.known else f"every answer takes max_new_tokens, {most}"
        if drawn is not None and after is not None and any(s.task is not None and s.task == judge.judged.task for s in after.stage.data):
            longer, assumed = min(most, drawn.length) / decoded.length, "answers as long as the completions that are learned from"
            after = None
        taught = next((s for s in after.stage.data if s.task is not None and s.task == judge.judged.task), None) if after else None
        if taught is not None:
            encode = self.tokenizer.encode
            texts = [i.rationale if taught.target == "rationale" else i.answer for i in judge.asked[:200]]
            length = 1 + sum(len(encode(t, add_special_tokens=False)) for t in texts) / len(texts)
            longer, assumed = min(most, length) / decoded.length, "answers as long as the rows that were learned"
        elif after is not None and decoded.known:
            assumed = "answers as long as the base's"
        seconds, flops = decoded.seconds * longer, decoded.executed_flops * longer
        tokens, useful = int(decoded.tokens * longer), int(decoded.useful_flops * longer)
        return Phase(judge.name, seconds, tokens, useful, int(flops), **self._rate(flops, seconds), assumed=assumed)


@dataclass
class _Decoded:
    """A whole eval of the base model, from some of its questions. length: tokens of an answer; grows: bytes."""

    tokens: float
    length: float
    known: bool
    useful_flops: float
    executed_flops: float
    seconds: float
    grows: int


@dataclass
class _Drawn:
    """A whole stage that draws. largest: (tokens, head rows) of a micro-batch; reference, held: bytes of a reference and of rollouts."""

    taken: Taken
    phases: list[Phase]
    largest: tuple[int, int]
    length: float
    reference: int
    held: int
