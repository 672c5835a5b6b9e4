"""A resolved recipe to live objects: data rendered, methods built, judges ready. Reads data; trains nothing."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch

from burnish import __version__
from burnish.answers.compare import same
from burnish.answers.extract import given, given_key
from burnish.config.contradictions import draws
from burnish.config.schema import LIKELIHOOD, Eval, Recipe, Rollouts, Source, Stage
from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Example, Message, Rendered, Sampling
from burnish.core.seeds import derive
from burnish.core.table import describe_row, did_you_mean, load_row
from burnish.data import formats
from burnish.data.chat import ChatFormat, Mask, Prepared, preview
from burnish.data.sampler import Sampler
from burnish.data.sources import Dropped
from burnish.data.tasks.base import Item, Task, after_examples, items, shown
from burnish.engines.connect import Api, connect, models
from burnish.engines.endpoint import Endpoint
from burnish.engines.local.engine import LocalEngine
from burnish.engines.remote import Conversation, RemoteEngine
from burnish.evals.accuracy import evaluate
from burnish.maths.estimators import bootstrap_mean
from burnish.maths.policy_gradient import Setting, override
from burnish.methods.policy_gradient import build as build_policy_gradient
from burnish.methods.rounds import Question, all_dead
from burnish.methods.stored import stored
from burnish.models.adapters import merge
from burnish.models.load import known, load_tokenizer
from burnish.models.policy import Policy
from burnish.rewards.build import build as build_rewards
from burnish.train.loop import Guard, State
from burnish.train.memory import Memory
from burnish.train.method import Method

PREVIEWED = 6


class Advance(Protocol):
    """Progress of an evaluation: how much is done, and a note."""

    def __call__(self, done: int, note: str = "") -> None: ...



@dataclass
class Rows:
    """Examples of all sources of a stage, with what was left out on the way."""

    examples: list[Example] = field(default_factory=list)
    dropped: Dropped = field(default_factory=Dropped)
    conversational: bool = False
    notices: dict[str, int] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    folders: list[Source] = field(default_factory=list)  # of trajectories: their rows are ids already

    @property
    def format(self) -> str:
        return ", ".join(dict.fromkeys(s["format"] for s in self.sources))


def example_of(item: Item, target: str, task: str, examples: Sequence[Item] = ()) -> Example:
    """A task's item as a conversation: the question (after solved ones), and the gold rationale or the bare answer to learn."""
    text = item.rationale if target == "rationale" else item.answer
    columns = {"answer": item.gold, "question": item.question, "level": item.level, "facts": dict(item.facts), "task": task}
    asked = after_examples(examples, item.question)
    return Example((Message("user", asked),), (Message("assistant", text),), columns=columns, where=item.id)


def read_sources(sources: Sequence[Source], seed: int, need: Literal["completion", "prompt"] = "completion") -> Rows:
    """All rows of a stage in the order given, each with at least what is needed of it. Raises DataError."""
    rows = Rows()
    for source in sources:
        if source.task is not None:
            task = cast(Task, load_row("task", source.task))
            first = shown(task, source.levels, source.shots, seed)
            told = {example.question for example in first}  # their answers stand in the prompt: no rows
            drawn = items(task, fold=source.fold, levels=source.levels, rows=(source.rows or 0) + len(told), seed=derive(seed, "data", source.task))
            made = [item for item in drawn if item.question not in told][: source.rows]
            rows.examples += [example_of(item, source.target, source.task, first) for item in made]
            rows.conversational = True
            rows.sources.append({"task": source.task, "format": f"task {source.task}", "rows": len(made)})
            continue
        if Path(str(source.file)).is_dir():
            for name in ("columns", "format", "on_bad_row"):
                if getattr(source, name) != type(source).model_fields[name].default:
                    message = f"{name} is for a file, and this is a folder of trajectories: it would do nothing"
                    raise ConfigError(message, where=str(source.file), remedy=f"remove {name}")
            rows.folders.append(source)
            continue
        found = formats.load(str(source.file), columns=source.columns, on_bad_row=source.on_bad_row, limit=source.limit, need=need)
        if source.format not in ("auto", found.format):
            raise DataError(
                f"rows are {found.format}, the recipe says {source.format}", where=str(source.file), remedy="type format: auto, or map columns"
            )
        rows.examples += found.examples
        for reason, n in found.dropped.counts.items():
            rows.dropped.counts[reason] = rows.dropped.counts.get(reason, 0) + n
            rows.dropped.first.setdefault(reason, found.dropped.first[reason])
        rows.conversational |= found.conversational
        for notice, n in found.notices.items():
            rows.notices[notice] = rows.notices.get(notice, 0) + n
        rows.sources.append({"file": str(source.file), "format": found.format, "rows": found.rows, "sha256": found.sha256})
    return rows


@dataclass
class StageMaterial:
    """See train.method.Material."""

    recipe: Recipe
    stage: Stage
    rows: Rows
    chat: ChatFormat
    context: int

    def render(self, mask: Mask) -> tuple[Prepared, tuple[Rendered, ...]]:
        train = self.stage.train
        self._no_folders()
        limit = min(train.max_tokens or self.context, self.context)
        skip = "skip" if any(s.on_bad_row == "skip" for s in self.stage.data) else "error"
        prepared = self.chat.render_all(
            self.rows.examples, mask, conversational=self.rows.conversational, max_tokens=limit, over_long=train.on_long_row,
            on_bad_row=skip, dropped=self.rows.dropped,
        )  # fmt: skip
        held = train.validation_rows or 0
        if held >= len(prepared.rows):
            raise DataError(
                f"validation_rows takes {held} of {len(prepared.rows)} rows and leaves none to train on",
                where=f"stages.{self.stage.name}.train.validation_rows",
                remedy=f"type {max(1, len(prepared.rows) // 10)}",
            )
        # Held-out rows are chosen by a seed of their own and never trained on.
        chosen = set(Sampler(len(prepared.rows), held, derive(self.recipe.seed, "held out", self.stage.name)).batch(0)) if held else set()
        kept = tuple(r for i, r in enumerate(prepared.rows) if i not in chosen)
        validation = tuple(r for i, r in enumerate(prepared.rows) if i in chosen)
        rest = Prepared(
            rows=kept, dropped=prepared.dropped, notices=prepared.notices, tokens=sum(len(r.ids) for r in kept),
            label_tokens=sum(sum(r.trained) for r in kept), longest=prepared.longest,
        )  # fmt: skip
        return rest, validation

    def questions(self, hint: str | None = None) -> tuple[Prepared, list[Question]]:
        """The rows as prompts to be answered, too long ones treated as `on_long_row` says. Raises DataError.

        hint  what takes the place of the last turn where the answer is told; one that does not fit tells nothing
        """
        self._no_folders()
        train, room = self.stage.train, self.context - 1
        limit = min(train.max_tokens or room, room)
        found: list[Question] = []
        dropped = self.rows.dropped
        for example in self.rows.examples:
            if example.text is not None or not example.prompt:
                raise DataError("has no prompt to answer", where=example.where, remedy="give rows with a prompt (and an answer for the rewards)")
            ids = self.chat.prompt(example.prompt, where=example.where)
            if len(ids) > limit:
                if train.on_long_row == "error":
                    raise DataError(f"its prompt has {len(ids)} tokens and {limit} fit", where=example.where, remedy="on_long_row: drop or truncate")
                if train.on_long_row == "drop":
                    dropped.add("prompt too long", example.where)
                    continue
                ids = ids[-limit:]  # from the left: the question is at the end
                dropped.add("prompt truncated", example.where)
            columns = dict(example.columns)
            if example.completion:
                columns.setdefault("answer", example.completion[-1].content)
            shown: Any = [{"role": m.role, "content": m.content} for m in example.prompt]
            told = () if hint is None else self._told(hint, example, columns)
            hinted = told if len(told) <= limit else ()
            found.append(Question(ids, shown if self.rows.conversational else example.prompt[-1].content, columns, example.where, hinted))
        if not found:
            raise DataError("no prompt is left to answer", where=f"stages.{self.stage.name}.data", remedy=f"dropped: {dropped.counts}")
        rows = tuple(Rendered(q.ids, (False,) * len(q.ids), q.where) for q in found)
        longest = max(len(q.ids) for q in found)
        return Prepared(rows=rows, dropped=dropped, notices={}, tokens=sum(len(q.ids) for q in found), label_tokens=0, longest=longest), found

    def _told(self, hint: str, example: Example, columns: Mapping[str, Any]) -> tuple[int, ...]:
        """Ids of a prompt whose last turn is the hint, its {question} and {answer} filled in."""
        if "answer" not in columns and "{answer}" in hint:
            raise DataError("has no answer to hint at", where=example.where, remedy="give rows with an answer, or type hint: null")
        *before, last = example.prompt
        said = {"question": last.content, "answer": str(columns.get("answer", ""))}
        text = re.sub(r"\{(question|answer)\}", lambda found: said[found[1]], hint)
        return self.chat.prompt((*before, replace(last, content=text)), where=example.where)

    def seed(self, purpose: str) -> int:
        return derive(self.recipe.seed, purpose, self.stage.name)

    @property
    def end_ids(self) -> Sequence[int]:
        return self.chat.end_ids

    def sampler(self, rows: int) -> Sampler:
        return Sampler(rows, self.stage.train.batch_rows, derive(self.recipe.seed, "order", self.stage.name))

    def _no_folders(self) -> None:
        if self.rows.folders:
            message = f"is a folder of completions with rewards, and {self.stage.method.name!r} learns from rows"
            raise DataError(message, where=str(self.rows.folders[0].file), remedy="name a .jsonl, .json or .csv file, or choose method: oreo")

    def scored(self, reward: str) -> tuple[Prepared, list[float]]:
        """Completions with the number in their column `reward`, or stored ones with their own. Raises DataError, ConfigError."""
        if self.stage.train.validation_rows:
            message = f"{self.stage.method.name!r} has no loss on held-out rows"
            raise ConfigError(message, where=f"stages.{self.stage.name}.train.validation_rows", remedy="remove it, and judge by evals")
        worth: dict[str, float] = {}
        rows: list[Rendered] = []
        dropped = self.rows.dropped
        for example in self.rows.examples:
            worth[example.where] = _number(example, reward)
        if self.rows.examples:
            prepared, _ = StageMaterial(self.recipe, self.stage, replace(self.rows, folders=[]), self.chat, self.context).render(load_row("mask", "completion"))
            rows += prepared.rows
        train = self.stage.train
        limit = min(train.max_tokens or self.context, self.context)
        for source in self.rows.folders:
            count = 0
            for one in stored(Path(str(source.file)), self._decode):
                if source.limit is not None and count >= source.limit:
                    break
                if one.reward is None:
                    dropped.add("no reward", one.where)
                elif len(one.prompt) + len(one.completion) > limit:
                    if train.on_long_row == "error":
                        message = f"has {len(one.prompt) + len(one.completion)} tokens and {limit} fit"
                        raise DataError(message, where=one.where, remedy="on_long_row: drop")
                    dropped.add(f"longer than {limit} tokens", one.where)  # a part of a completion did not earn its reward
                else:
                    trained = (False,) * len(one.prompt) + (True,) * len(one.completion)
                    rows.append(Rendered((*one.prompt, *one.completion), trained, one.where))
                    worth[one.where] = one.reward
                    count += 1
            self.rows.sources.append({"file": str(source.file), "format": "trajectories", "rows": count})
        if not rows:
            raise DataError(f"no completion is left; dropped: {dropped.counts}", where=f"stages.{self.stage.name}.data")
        labels = sum(sum(r.trained) for r in rows)
        made = Prepared(
            rows=tuple(rows), dropped=dropped, notices={}, tokens=sum(len(r.ids) for r in rows), label_tokens=labels, longest=max(len(r.ids) for r in rows)
        )  # fmt: skip
        return made, [worth[r.where] for r in rows]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.chat.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def text(self, token: int) -> str:
        """What a token adds to a text."""
        return self._decode([token])

    def gold(self, questions: Sequence[Question]) -> list[tuple[int, ...]]:
        """The completion each question's own row gives, as ids, its end included. Raises DataError for a row without one."""
        of = {example.where: example for example in self.rows.examples}
        found: list[tuple[int, ...]] = []
        for question in questions:
            row = self.chat.render(of[question.where], load_row("mask", "completion"))
            asked = self.chat.prompt(of[question.where].prompt, where=question.where)
            first = len(asked)
            if row.ids[:first] != asked or any(row.trained[:first]) or not any(row.trained):
                raise DataError("its completion does not follow its prompt as the model would be asked", where=question.where)
            last = max(i for i, trained in enumerate(row.trained) if trained)
            found.append(row.ids[first : last + 1])
        return found

    def steps(self, sampler: Sampler, each: int = 1) -> int:
        train = self.stage.train
        return train.steps if train.steps is not None else sampler.steps(train.epochs or 0) * each


def _number(example: Example, column: str) -> float:
    """What a row's completion was worth. Raises DataError where the column is missing or no finite number."""
    if column not in example.columns:
        known = ", ".join(example.columns) or "no other column"
        message = f"has no column {column!r}.{did_you_mean(column, example.columns)} Besides prompt and completion: {known}"
        raise DataError(message, where=example.where, remedy="say which holds the reward: method: {name: oreo, reward_column: <your column>}")
    value = example.columns[column]
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        said = "is missing (null)" if value is None else f"is {value!r}, wanted a finite number"
        raise DataError(f"its {column!r} {said}", where=example.where, remedy="give every completion a number, failures too, or leave the row out")
    return float(value)


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


# ---- judges: what a model is held against, before the first stage and after each -----------------------------------


@dataclass
class Questions:
    """An eval of the recipe: questions with known answers, and the strategies that answer them."""

    name: str
    judged: Eval
    seed: int
    chat: ChatFormat | Conversation
    task: Task
    asked: Sequence[Item]
    validation: Sequence[Item]

    @classmethod
    def of(cls, name: str, judged: Eval, seed: int, chat: ChatFormat | Conversation) -> Questions:
        """Draw the questions, or read them. Raises DataError."""
        if judged.task is None:
            task, asked = questions_in(str(judged.file), judged.columns, judged.rows)
            return cls(name, judged, seed, chat, task, asked, ())
        task = cast(Task, load_row("task", judged.task))
        first = shown(task, judged.levels, judged.shots, seed)
        seed = derive(seed, "eval", name)
        asked = items(task, fold=judged.fold, levels=judged.levels, rows=judged.rows or 0, seed=seed)
        rows = judged.validation_rows
        validation = items(task, fold="validation", levels=judged.levels, rows=rows, seed=seed) if rows else []
        if judged.shots:
            asked, validation = (few_shot(some, first) for some in (asked, validation))
        return cls(name, judged, seed, chat, task, asked, validation)

    @property
    def size(self) -> int:
        return len(self.asked)

    def __call__(self, policy: Policy, stage: str, advance: Advance, poll: Callable[[], None]) -> dict[str, Any]:
        policy.train(False)
        return self.ask(LocalEngine(policy, end_ids=self.chat.end_ids), stage, advance, poll)

    def ask(self, engine: LocalEngine | RemoteEngine, stage: str, advance: Advance, poll: Callable[[], None]) -> dict[str, Any]:
        """The answers of one engine, judged."""
        judged = self.judged
        candidates = judged.temperature if isinstance(judged.temperature, tuple) else ()
        sampling = Sampling(
            temperature=candidates[0] if candidates else float(judged.temperature),  # type: ignore[arg-type]
            top_k=judged.top_k, top_p=judged.top_p, min_p=judged.min_p, max_new_tokens=judged.max_new_tokens, stop=judged.stop,
            seed=derive(self.seed, "samples"),
        )  # fmt: skip
        began = time.monotonic()

        def each_step() -> None:
            poll()
            advance(0, f"{time.monotonic() - began:.0f} s")

        engine.poll = each_step
        result = evaluate(
            engine, self.chat, self.task, self.asked, judged.strategies, sampling,
            validation=self.validation, candidates=candidates, name=self.name, fold=judged.fold, stage=stage,
        )  # fmt: skip
        advance(self.size)
        return result | {"spend": asdict(engine.spend)}

    def line(self, result: Mapping[str, Any]) -> str:
        parts = [f"{row['strategy']}{' (oracle)' if row['oracle'] else ''} {row['accuracy']:.1%}" for row in result["strategies"]]
        drawn = any(row["strategy"] != "greedy" for row in result["strategies"])
        heat = f", temperature {result['settings']['temperature']:g}" if drawn else ""
        return f"{result['stage']}/{self.name}: {', '.join(parts)} (n = {result['n']}{heat}, {result['seconds']:.0f} s)"


def few_shot(asked: Sequence[Item], examples: Sequence[Item]) -> list[Item]:
    """The items with solved questions before their own, as `read_sources` puts them before training rows."""
    return [replace(item, facts={**item.facts, "prompt": [Message("user", after_examples(examples, item.question))]}) for item in asked]


def questions_in(file: str, columns: Mapping[str, str], rows: int | None) -> tuple[Task, list[Item]]:
    """A file's rows as questions: right is the wanted text, or a marked answer that says it. Raises DataError."""
    mapping = dict(columns)
    if "answer" in mapping:
        mapping["completion"] = mapping.pop("answer")
    found = formats.load(file, columns=mapping, limit=rows)
    asked = []
    for e in found.examples:
        question = e.prompt[-1].content if e.prompt else ""
        asked.append(Item(question=question, gold=e.completion[-1].content, rationale="", answer="", level=0, id=e.where, facts={"prompt": e.prompt}))
    task = Task(
        name=Path(file).name, make=_not_made, verify=lambda text, item: same(given(text), item.gold), answer_key=given_key,
        levels=(0,), verifier_needs_gold=True,
    )  # fmt: skip
    return task, asked


def _not_made(level: int, rng: Any) -> Item:
    raise DataError("a file's questions are read, not made")


@dataclass
class HeldOut:
    """How likely a model finds rows kept out of training: the graded version of a question with one wanted answer.

    The grade of a row is its likelihood per token, exp(-nats / labels), in [0, 1]; rows are compared pairwise like answers.
    """

    name: str
    stage: str
    method: Any
    chat: ChatFormat

    @property
    def size(self) -> int:
        return len(self.method.validation)

    def __call__(self, policy: Policy, stage: str, advance: Advance, poll: Callable[[], None]) -> dict[str, Any]:
        rows = self.method.validation
        found, flops = self.method.held_out(policy, 4096)
        advance(len(rows))
        labels = sum(n for _, n in found)
        grades = [math.exp(-nats / n) for nats, n in found]
        mean = sum(grades) / len(grades)
        low, high = bootstrap_mean(grades, seed=0)
        spend = {"prefill_tokens": 0, "sampled_tokens": 0, "scored_tokens": labels, "useful_flops": flops, "executed_flops": flops}
        row = {"strategy": LIKELIHOOD, "oracle": False, "accuracy": mean, "interval": [low, high], "correct": grades, "spend": spend,
               "truncated": 0, "unanswered": 0}  # fmt: skip
        return {
            "schema": 1, "eval": self.name, "task": f"rows held out of stage {self.stage}", "fold": "held out", "n": len(rows), "stage": stage,
            "settings": {"template": self.chat.template_sha256, "label_tokens": labels, "nats_per_label": sum(v for v, _ in found) / labels},
            "item_ids": [r.where for r in rows], "strategies": [row],
            "samples": [
                {"id": r.where, "prompt": policy.decode(r.ids[: r.trained.index(True)]), "gold": policy.decode(r.ids[r.trained.index(True) :]),
                 "level": None, "completions": []}
                for r in rows[:20]
            ],
            "spend": spend,
        }  # fmt: skip

    def line(self, result: Mapping[str, Any]) -> str:
        nats = result["settings"]["nats_per_label"]
        return f"{result['stage']}/{self.name}: {nats:.4f} nats a label on {result['n']} held-out rows (likelihood {result['strategies'][0]['accuracy']:.1%})"


def judges(recipe: Recipe, policy: Policy, built: Sequence[Built]) -> list[Any]:
    """Every evaluation of a recipe in order: its evals, then the rows each stage holds out. Raises DataError."""
    chat = ChatFormat(policy.tokenizer)
    made: list[Any] = [Questions.of(name, judged, recipe.seed, chat) for name, judged in recipe.evals.items()]
    of_stage = {b.stage.name: b for b in built}
    made += [HeldOut(name, stage, of_stage[stage].method, chat) for name, stage in (recipe.held_out.items() if built else ())]
    return made


# ---- engines over HTTP -----------------------------------------------------------------------------------------------


def remote_engine(
    url: str, model: str, *, api: Api = "auto", tokenizer: str | None = None, version: str = "", in_flight: int = 64
) -> tuple[RemoteEngine, ChatFormat | Conversation]:
    """An engine over the server at `url`, and what renders prompts for it. See engines.connect for what it raises.

    tokenizer  a folder, bundled name or hub id (None: the model's own name, where it is one of these)
    """
    if api == "chat" and tokenizer is not None:
        raise ConfigError("a chat API renders prompts itself and takes no tokenizer", where="--tokenizer", remedy="leave it out")
    endpoint = Endpoint(url, in_flight=in_flight)
    models(endpoint)  # a server that is not there is said before any tokenizer is looked for
    source = tokenizer if tokenizer is not None else model if api != "chat" and known(model) else None
    words = None if source is None else load_tokenizer(source)
    chat = Conversation() if words is None else ChatFormat(words)
    return connect(endpoint, model, api=api, tokenizer=words, end_ids=chat.end_ids, version=version), chat


# ---- this machine ---------------------------------------------------------------------------------------------------


def gflops(dtype: torch.dtype, size: int = 1536, seconds: float = 0.4) -> float:
    """The best of several products of size^3 within `seconds`: this machine's speed now."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e9


def environment() -> dict[str, Any]:
    """environment.json: versions, machine, threads, and how fast it is today."""
    import numpy
    import peft
    import tokenizers
    import transformers

    try:
        commit = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    modules = {"torch": torch, "transformers": transformers, "peft": peft, "tokenizers": tokenizers, "numpy": numpy}
    return {
        "schema": 1,
        "burnish": __version__,
        "commit": commit,
        "python": platform.python_version(),
        "versions": {name: module.__version__ for name, module in modules.items()},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "calibration_gflops": {"float32": round(gflops(torch.float32), 1), "bfloat16": round(gflops(torch.bfloat16), 1)},
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
