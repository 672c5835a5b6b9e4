"""A stage's data, read and rendered: what its method is made of. Reads data; trains nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from burnish.config.schema import Recipe, Source, Stage
from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Example, Message, Rendered
from burnish.core.seeds import derive
from burnish.core.table import did_you_mean, load_row
from burnish.data import formats
from burnish.data.chat import ChatFormat, Mask, Prepared
from burnish.data.sampler import Sampler
from burnish.data.sources import Dropped
from burnish.data.tasks.base import Item, Task, after_examples, items, shown
from burnish.methods.rounds import Question
from burnish.methods.stored import stored


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
