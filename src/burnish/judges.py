"""What a model is held against, before the first stage and after each: questions with answers, and rows held out; and the servers that may answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from burnish.answers.compare import same
from burnish.answers.extract import given, given_key
from burnish.build import Built
from burnish.config.schema import LIKELIHOOD, Eval, Recipe
from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Message, Sampling
from burnish.core.seeds import derive
from burnish.core.table import load_row
from burnish.data import formats
from burnish.data.chat import ChatFormat
from burnish.data.tasks.base import Item, Task, after_examples, items, shown
from burnish.engines.connect import Api, connect, models
from burnish.engines.endpoint import Endpoint
from burnish.engines.local.engine import LocalEngine
from burnish.engines.remote import Conversation, RemoteEngine
from burnish.evals.accuracy import evaluate
from burnish.maths.estimators import bootstrap_mean
from burnish.models.load import known, load_tokenizer
from burnish.models.policy import Policy


class Advance(Protocol):
    """Progress of an evaluation: how much is done, and a note."""

    def __call__(self, done: int, note: str = "") -> None: ...


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
