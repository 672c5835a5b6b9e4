"""The verbs as Python: `burnish.run`, `burnish.load`, `burnish.check`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.config.check import Checked
from burnish.config.check import check as check_resolved
from burnish.config.load import load as load_recipe


def _overrides(values: Mapping[str, Any]) -> list[str]:
    import yaml

    return [f"{key.replace('__', '.')}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}" for key, value in values.items()]


def run(recipe: str | os.PathLike[str], *, resume: bool = False, under: str | Path = "runs", quiet: bool = False, **overrides: Any) -> Any:
    """Run a recipe and return its Run (`.folder`, `.report`, `.verdict`). Overrides: `stages__sft__train__steps=3`.

    Raises what the command line exits with: ConfigError, DataError, StorageError, ... (burnish.core.errors).
    """
    from burnish.pipeline import run as run_recipe
    from burnish.train.log import Progressing

    return run_recipe(recipe, _overrides(overrides), resume=resume, under=Path(under), progress=Progressing(quiet))


def check(recipe: str | os.PathLike[str], **overrides: Any) -> Checked:
    """What a recipe would do, without doing it. Raises ConfigError that names every fault."""
    return check_resolved(load_recipe(recipe, _overrides(overrides)))


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

    def _ids(self, prompt: str | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        from burnish.core.records import Message

        turns = [Message("user", prompt)] if isinstance(prompt, str) else [Message(m["role"], m["content"]) for m in prompt]  # type: ignore[arg-type]
        return self.chat.prompt(turns)

    def generate(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, str]]],
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
        nodes = self.engine.prefill_many([self._ids(p) for p in prompts])
        found = self.engine.sample(nodes, sampling, [(i, 0) for i in range(len(nodes))])
        for node in nodes:
            self.engine.free(node)
        return [t.text for t in found]

    def score(self, prompts: Sequence[str | Sequence[Mapping[str, str]]], completions: Sequence[str]) -> list[float]:
        """Log-probability in nats of each completion (with its end token) after its prompt."""
        from burnish.core.records import Example, Message
        from burnish.core.table import load_table
        from burnish.forest.pack import Batch
        from burnish.forest.stream import Tree

        mask = load_table("mask")["completion"]
        examples = []
        for prompt, completion in zip(prompts, completions, strict=True):
            turns = [Message("user", prompt)] if isinstance(prompt, str) else [Message(m["role"], m["content"]) for m in prompt]  # type: ignore[arg-type]
            examples.append(Example(tuple(turns), (Message("assistant", completion),)))
        batch = Batch([Tree.row(r.ids, r.trained) for r in (self.chat.render(e, mask) for e in examples)])
        total = [0.0] * len(examples)
        self.policy.train(False)
        for micro in batch.split(8192):
            for value, unit in zip(self.policy.logprobs(micro).tolist(), batch.unit[micro.items].tolist()):
                total[unit] += value
        return total


def load(model: str | os.PathLike[str], *, dtype: str = "auto", device: str = "cpu") -> Loaded:
    """A bundled model, a folder (HF or PEFT layout) or a hub id, ready to `.generate` and `.score`; `.policy` underneath."""
    from burnish.models.load import load_policy

    return Loaded(load_policy(os.fspath(model), dtype=dtype, device=device))  # type: ignore[arg-type]
