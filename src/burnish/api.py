"""The verbs as Python: `burnish.run`, `burnish.load`, `burnish.check`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.config.check import Checked
from burnish.config.check import check as check_resolved
from burnish.config.load import load as load_recipe
from burnish.core.machine import uncollected

if TYPE_CHECKING:
    from burnish.core.records import Message, Spend

Asked = str | Sequence[Mapping[str, str]]  # a prompt: text, or a list of {role, content}


def _overrides(values: Mapping[str, Any]) -> list[str]:
    import yaml

    return [f"{key.replace('__', '.')}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}" for key, value in values.items()]


def run(recipe: str | os.PathLike[str], *, resume: bool = False, under: str | Path = "runs", quiet: bool = False, **overrides: Any) -> Any:
    """Run a recipe and return its Run (`.folder`, `.report`, `.verdict`). Overrides: `stages__sft__train__steps=3`.

    Raises what the command line exits with: ConfigError, DataError, StorageError, ... (burnish.core.errors).
    """
    with uncollected():
        from burnish.pipeline import run as run_recipe
    from burnish.train.log import Progressing

    return run_recipe(recipe, _overrides(overrides), resume=resume, under=Path(under), progress=Progressing(quiet))


def check(recipe: str | os.PathLike[str], **overrides: Any) -> Checked:
    """What a recipe would do, without doing it. Raises ConfigError that names every fault."""
    return check_resolved(load_recipe(recipe, _overrides(overrides)))


@dataclass(frozen=True)
class Sampled:
    """One sample behind an answer. `finish` is "budget" where the budget cut it: then it counted for nothing."""

    text: str
    answer: str | None
    score: float | None
    tokens: int
    finish: str
    chosen: bool


@dataclass(frozen=True)
class Solution:
    """What a strategy answers, and what that took.

    answer  as the task reads it from the text; without a task the marked answer, or the text itself. None: there is none
    text    the completion that was chosen; None where the budget left none whole
    spend   the prompt read once, every sample, and scoring them
    """

    prompt: str
    answer: str | None
    text: str | None
    spend: Spend
    trace: tuple[Sampled, ...]


class Loaded:
    """A model ready to answer: `policy` underneath, text in and out."""

    def __init__(self, policy: Any) -> None:
        from burnish.data.chat import ChatFormat
        from burnish.engines.local.engine import LocalEngine

        self.policy = policy
        self.chat = ChatFormat(policy.tokenizer)
        self.engine = LocalEngine(policy, end_ids=self.chat.end_ids)

    @property
    def has_template(self) -> bool:
        return self.chat.has_template

    @staticmethod
    def _turns(prompt: Asked) -> list[Message]:
        from burnish.core.records import Message

        return [Message("user", prompt)] if isinstance(prompt, str) else [Message(m["role"], m["content"]) for m in prompt]  # type: ignore[arg-type]

    def generate(
        self,
        prompts: Sequence[Asked],
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        """One answer a prompt; a prompt is text or a list of {role, content}. Greedy unless a temperature is given."""
        from burnish.core.records import Sampling

        sampling = Sampling(temperature, top_k, top_p, max_new_tokens, tuple(stop), seed, min_p)
        nodes = self.engine.prefill_many([self.chat.prompt(self._turns(p)) for p in prompts])
        found = self.engine.sample(nodes, sampling, [(i, 0) for i in range(len(nodes))])
        for node in nodes:
            self.engine.free(node)
        return [t.text for t in found]

    def solve(
        self,
        prompts: Sequence[Asked],
        *,
        strategy: str = "vote:16",
        task: str | None = None,
        temperature: float = 0.7,
        max_new_tokens: int = 256,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        budget_tokens: int | None = None,
    ) -> list[Solution]:
        """An answer a prompt, found by a test-time strategy; see `burnish ls strategy` and `burnish ls scorer`.

        task           lends what its votes are counted by and, where it reads no gold answer, its rule
        budget_tokens  the most sampled tokens a prompt may cost
        A prompt's answer is the same alone and among others. Raises ConfigError for a strategy that does not exist, that
        this task or engine cannot serve, or that is no way to answer; DataError for a prompt the task cannot judge.
        """
        from burnish.answers.extract import given, given_key
        from burnish.core.errors import ConfigError, DataError
        from burnish.core.records import Sampling, Trajectory
        from burnish.core.table import load_row
        from burnish.data.tasks.base import Item
        from burnish.engines.base import Prompt
        from burnish.engines.pool import Pool
        from burnish.evals.accuracy import judge_of, stream_of
        from burnish.search.base import Budget, Judge
        from burnish.search.base import strategy as bound

        asked = bound(strategy)
        if asked.oracle:
            remedy = f"type vote:{asked.spec.n}, or measure it with burnish eval"
            raise ConfigError("reads the right answers: a ceiling and no way to answer", where=asked.spec.title, remedy=remedy)
        if temperature == 0 and asked.parameters.get("n", 1) > 1:
            same = f"{asked.parameters['n']} samples at temperature 0 are {asked.parameters['n']} times the same text"
            raise ConfigError(same, where=asked.name, remedy="give a temperature above 0, or use greedy")
        turns = [self._turns(prompt) for prompt in prompts]
        questions = [said[-1].content if said else "" for said in turns]
        judge = Judge(given_key)
        if task is not None:
            lent = judge_of(load_row("task", task), [Item(q, "", "", "", 0) for q in questions])  # pyright: ignore[reportArgumentType]

            def rule(index: int, text: str) -> bool:
                assert lent.rule is not None
                try:
                    return lent.rule(index, text)
                except Exception as error:
                    raise DataError(f"task {task!r} cannot judge it: {error}", where=f"prompt {index + 1}") from error

            judge = Judge(lent.answer_key, rule=None if lent.rule is None else rule)

        def said_by(sample: Trajectory) -> str | None:
            if task is None or judge.answer_key is None:
                return given(sample.text)
            key = judge.answer_key(sample.text)
            return None if key is None else str(key)

        rows = [Prompt(stream_of("\x1f".join(f"{m.role}\x1f{m.content}" for m in t)), self.chat.prompt(t)) for t in turns]
        sampling = Sampling(temperature, top_k, top_p, max_new_tokens, tuple(stop), seed, min_p)
        self.policy.train(False)
        found = asked.run(Pool(self.engine), rows, judge, Budget(sampling, budget_tokens))
        return [
            Solution(
                question,
                None if outcome.answer is None else said_by(outcome.answer),
                outcome.text,
                outcome.spend,
                tuple(
                    Sampled(
                        t.text, said_by(t) if i < len(outcome.whole) else None, outcome.scores[i] if i < len(outcome.scores) else None,
                        t.cost.sampled_tokens, t.finish, t is outcome.answer,
                    )
                    for i, t in enumerate(outcome.trace)
                ),
            )
            for question, outcome in zip(questions, found, strict=True)
        ]  # fmt: skip

    def score(self, prompts: Sequence[Asked], completions: Sequence[str]) -> list[float]:
        """Log-probability in nats of each completion (with its end token) after its prompt."""
        from burnish.core.records import Example, Message
        from burnish.core.table import load_table
        from burnish.forest.pack import Batch
        from burnish.forest.stream import Tree

        mask = load_table("mask")["completion"]
        examples = []
        for prompt, completion in zip(prompts, completions, strict=True):
            examples.append(Example(tuple(self._turns(prompt)), (Message("assistant", completion),)))
        batch = Batch([Tree.row(r.ids, r.trained) for r in (self.chat.render(e, mask) for e in examples)])
        total = [0.0] * len(examples)
        self.policy.train(False)
        for micro in batch.split(8192):
            for value, unit in zip(self.policy.logprobs(micro).tolist(), batch.unit[micro.items].tolist()):
                total[unit] += value
        return total


def load(model: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto") -> Loaded:
    """A bundled model, a folder (HF or PEFT layout) or a hub id, ready to `.generate`, `.solve` and `.score`; `.policy` underneath.

    device: auto (cuda where there is one), cpu, cuda or cuda:<n>. Raises MachineError where it is not there.
    """
    from burnish.models.load import load_policy

    return Loaded(load_policy(os.fspath(model), dtype=dtype, device=device))  # type: ignore[arg-type]
