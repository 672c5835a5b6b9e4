"""Plain records that travel between layers: no tensors, no models, JSON in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal, get_args

from burnish.core.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
Finish = Literal["stop", "length", "stop_string", "budget", "partial"]  # partial: drawing was stopped, and could go on
Failure = Literal["timeout", "crash", "invalid", "infra"]


@dataclass(frozen=True)
class Message:
    """One turn. `train=False` keeps an assistant turn out of the loss; None leaves it to the mask policy."""

    role: Role
    content: str
    train: bool | None = None


@dataclass(frozen=True)
class Example:
    """One row of data, already understood: a conversation whose last turns are to be learned or produced.

    prompt      messages given to the model
    completion  messages to be learned (empty for prompt-only rows)
    text        plain text instead of a conversation (language modelling); then prompt and completion are empty
    columns     everything else the row carried: gold answers, task names, level
    where       `file:line` or `task#index`, for error messages
    """

    prompt: tuple[Message, ...] = ()
    completion: tuple[Message, ...] = ()
    text: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    where: str = ""


@dataclass(frozen=True)
class Rendered:
    """An example as token ids. `trained[i]` is True where ids[i] is a label; ids are final and never re-tokenised."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    where: str = ""


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of a trajectory with a meaning: prompt, completion, think, step, answer."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: logits / temperature, then top-k, then top-p, then min-p. Temperature 0 is greedy.

    min_p: tokens less likely than this share of the likeliest are never drawn (arXiv:2407.01082).

    stop: strings that end a sample. The token that completes one stays in the ids; the text is cut before it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0
    min_p: float = 0.0


@dataclass(frozen=True)
class Spend:
    """What an answer cost, in units that compare training with inference. Tokens are counted.

    One exception: a server over HTTP may not report them. Its trajectories say so (`meta["usage"] == "estimated"`).
    """

    prefill_tokens: int = 0
    sampled_tokens: int = 0
    scored_tokens: int = 0
    useful_flops: int = 0
    executed_flops: int = 0

    def __add__(self, other: Spend) -> Spend:
        return Spend(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values())))


@dataclass(frozen=True)
class Trajectory:
    """What an engine leaves behind. `tokens` is prompt and completion; `spans` say which is which.

    logprobs[i] is the sampler's log-probability of the i-th *sampled* token under the distribution it was drawn from
    at temperature 1 without truncation (what training compares with), or None where the engine cannot say.
    """

    id: str
    parent: str | None
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    weights_version: str
    sampler: Mapping[str, Any]
    spans: tuple[Span, ...]
    finish: Finish
    text: str = ""
    rewards: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    cost: Spend = Spend()
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def completion(self) -> tuple[int, ...]:
        """The sampled ids. Raises DataError where the engine could not report them: they are not made up from the text."""
        for span in self.spans:
            if span.kind == "completion":
                return self.tokens[span.start :]
        raise DataError(
            "its token ids are not known: the server gave text only",
            where=f"trajectory {self.id}",
            remedy="sample with an engine that reports ids: local, or vLLM",
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Scored:
    """What a reward says of one sample: a value, or that it abstains (neither value nor error), or how it failed.

    error   timeout (killed at its deadline), crash (it raised, or its process died), invalid (what it returned is no
            reward), infra (what it depends on was out of reach). An error is not a bad sample: it is never 0
    detail  what went wrong, in one line
    spans   [(end, value)] of a process reward, a step each, None where it abstains; `end` is where the step ends, in
            tokens of the completion wherever the caller scores tokens
    """

    value: float | None = None
    error: Failure | None = None
    detail: str = ""
    spans: tuple[tuple[int, float | None], ...] = ()

    def __post_init__(self) -> None:
        if self.value is not None and self.error is not None:
            raise ValueError(f"both a value ({self.value}) and an error ({self.error})")
        if self.error is not None and self.error not in get_args(Failure):
            raise ValueError(f"{self.error!r} is not a failure; there are {', '.join(get_args(Failure))}")
        given = [self.value, *(value for _, value in self.spans)]
        if not all(value is None or isfinite(value) for value in given):
            raise ValueError(f"a reward is a finite number: {given}")

    @property
    def abstains(self) -> bool:
        return self.value is None and self.error is None

    def to_json(self) -> dict[str, Any]:
        """`{"value": 1.0}`, `{"value": null}` (abstains) or `{"error": "timeout", "detail": ...}`, with any spans."""
        said: dict[str, Any] = {"value": self.value} if self.error is None else {"error": self.error}
        if self.detail:
            said["detail"] = self.detail
        if self.spans:
            said["spans"] = [list(span) for span in self.spans]
        return said

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Scored:
        """What `to_json` wrote. Raises ValueError for anything else."""
        if ("value" in said) == ("error" in said) or set(said) - {"value", "error", "detail", "spans"}:
            raise ValueError(f"not a scored sample: {dict(said)!r}")
        spans = tuple((int(end), None if value is None else float(value)) for end, value in said.get("spans", ()))
        value = said.get("value")
        return cls(None if value is None else float(value), said.get("error"), str(said.get("detail", "")), spans)


@dataclass(frozen=True)
class ModelShape:
    """What the FLOP formulas need to know about a model .

    body_parameters   parameters in the body's matrix products, per token (active ones, for mixtures of experts)
    windows           one entry a layer: the sliding window in tokens, or None for full attention
    adapter_parameters parameters in adapter matrix products; trained="adapter" means the body's weights are frozen
    """

    layers: int
    hidden: int
    vocabulary: int
    query_heads: int
    kv_heads: int
    key_width: int
    value_width: int
    body_parameters: int
    parameters: int
    windows: tuple[int | None, ...]
    adapter_parameters: int = 0
    trained: Literal["full", "adapter"] = "full"
    head_trained: bool = True
