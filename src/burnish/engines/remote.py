"""An engine over any OpenAI-compatible endpoint. What the API cannot say is not made up: `can` and every trajectory say so.

Every row is a request of its own with a seed of its own, a function of (seed, item, sample), so that a row does not depend
on its neighbours. There is no fork: the prefix is sent again with every row, and charged to it as prefill.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from burnish.core.errors import ConfigError, DataError, MachineError
from burnish.core.records import Finish, Message, Sampling, Span, Spend, Trajectory
from burnish.core.seeds import derive
from burnish.engines.base import NOTHING, Node, Nodes, check_rows, check_sampling, cut
from burnish.engines.endpoint import Answer, Endpoint, Request

Prompts = Literal["ids", "text", "chat"]
PATH: dict[Prompts, str] = {"ids": "/completions", "text": "/completions", "chat": "/chat/completions"}
BYTES_PER_TOKEN = 4  # of text whose tokens nobody counts: an estimate, and marked as one


class Conversation:
    """Prompts for a server that takes messages: their ids are the bytes of their JSON, so that no tokenizer is needed.

    The server renders them with its own template, which is not known here.
    """

    template_sha256: str | None = None
    end_ids: tuple[int, ...] = ()

    def prompt(self, messages: Sequence[Message], *, where: str = "prompt") -> tuple[int, ...]:
        """See data.chat.ChatFormat. Raises DataError where the last turn is not one to answer."""
        if not messages or messages[-1].role not in ("user", "tool"):
            raise DataError("a prompt ends with a user or a tool turn", where=where)
        return tuple(json.dumps([{"role": m.role, "content": m.content} for m in messages]).encode())

    @staticmethod
    def messages(ids: Sequence[int]) -> list[dict[str, str]]:
        """Back from ids. Raises ConfigError for ids that are tokens."""
        try:
            return json.loads(bytes(ids))
        except ValueError as error:
            remedy = "render prompts with Conversation, or use the completions API"
            raise ConfigError("a chat API takes messages, and these are token ids", where="prompt", remedy=remedy) from error


@dataclass(frozen=True)
class Said:
    """One completion as the server told it; None: it did not tell. `finish` is the API's word for it."""

    text: str
    finish: Any
    ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    stop_reason: Any = None


class RemoteEngine(Nodes):
    """See engines.base.Engine.

    model      the name the server knows it by; an answer by another one is an error
    version    yours, for the weights behind that name: `weights_version` is model@version
    tokenizer  needed for prompts "text", to turn ids into text, and to count what the server does not
    prompts    how they travel: token ids, text (which the server tokenises again), or messages (see Conversation)
    logprobs   ask for log-probabilities: only where they are those of the model itself (see engines.connect). Many
               servers leave the end token's out: `meta["logprobs_of"]` says how many sampled tokens they cover
    context    most tokens of prompt and completion, None where the server does not say
    poll       called many times a second while waiting; what it raises ends the call and cuts the connections
    """

    kind = "openai"

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        version: str = "",
        tokenizer: Any = None,
        prompts: Prompts = "ids",
        logprobs: bool = False,
        end_ids: Sequence[int] = (),
        context: int | None = None,
        poll: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        if prompts == "text" and tokenizer is None:
            raise ConfigError("prompts of text need the model's tokenizer", where="engine", remedy="give one: --tokenizer FOLDER")
        self.endpoint, self.model, self.version, self.tokenizer = endpoint, model, version, tokenizer
        self.prompts: Prompts = prompts
        self.logprobs, self.context, self.poll = logprobs, context, poll
        self.end_ids = tuple(dict.fromkeys(end_ids))
        self.spend = NOTHING
        self.usage: Counter[str] = Counter()
        self.retried = 0

    @property
    def can(self) -> frozenset[str]:
        return frozenset({"logprobs"} if self.logprobs else ())

    @property
    def weights_version(self) -> str:  # type: ignore[override]  (Nodes reads it)
        return f"{self.model}@{self.version}" if self.version else self.model

    def describe(self) -> dict[str, Any]:
        """For results: who answered, how prompts went there, how tokens were counted (rows by way)."""
        return {
            "kind": self.kind,
            "url": self.endpoint.url,
            "model": self.model,
            "weights_version": self.weights_version,
            "prompts": self.prompts,
            "can": sorted(self.can),
            "context": self.context,
            "usage": dict(self.usage),
            "retried": self.retried,
        }

    # ---- sampling

    def sample(self, nodes: Sequence[Node], sampling: Sampling, keys: Sequence[tuple[int, int]]) -> list[Trajectory]:
        """See engines.base. Raises MachineError where no usable answer came, ConfigError for what the API cannot do."""
        check_sampling(sampling)
        check_rows(nodes, keys)
        self.check(sampling)
        requests: list[Request] = []
        for i, (node, (item, sample)) in enumerate(zip(nodes, keys)):
            path = self._held(node).path
            body = self.body(path, sampling) | {"seed": derive(sampling.seed, "sample", item, sample)}
            requests.append(Request("POST", PATH[self.prompts], body, f"row {i + 1} of {len(nodes)}"))
        rows: dict[int, Trajectory] = {}
        version = self.weights_version

        def took(i: int, answer: Answer) -> None:
            if self.weights_version != version:
                raise MachineError(
                    f"asked version {version}, and the server was at {self.weights_version} when it answered",
                    where=self.endpoint.where(requests[i]),
                    remedy="change weights between calls of sample, not during one",
                )
            rows[i] = self._trajectory(requests[i], answer, nodes[i], sampling, keys[i])
            self.spend += rows[i].cost

        self.endpoint.ask_all(requests, took, self.poll)
        return [rows[i] for i in range(len(nodes))]

    def check(self, sampling: Sampling) -> None:
        """Raise ConfigError for a setting the API has not: to leave it out would be another distribution."""
        for name, off in (("top_k", 0), ("min_p", 0.0)):
            if getattr(sampling, name) != off:
                remedy = f"type {name}: {off:g}, or serve the model with vLLM"
                raise ConfigError(f"this API has no {name}", where=f"sampling.{name}", remedy=remedy)

    def body(self, path: tuple[int, ...], sampling: Sampling) -> dict[str, Any]:
        """The request, less its seed. Everything is said: a server's own defaults would be another distribution."""
        made: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.room(path, sampling.max_new_tokens),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": 0,
            "frequency_penalty": 0,
        }
        if self.prompts == "chat":
            made["messages"] = Conversation.messages(path)
        else:
            made["prompt"] = list(path) if self.prompts == "ids" else self.decode(path, keep_special=True)
        if sampling.stop:
            made["stop"] = list(sampling.stop)
        if self.logprobs:
            made["logprobs"] = True if self.prompts == "chat" else 1
        return made

    def room(self, path: Sequence[int], wanted: int) -> int:
        """Tokens that may be sampled after these. Raises DataError where there is no room for one."""
        if self.context is None or self.prompts == "chat":
            return wanted
        if len(path) >= self.context:
            raise DataError(
                f"has {len(path)} tokens; the server takes {self.context} with the completion",
                where="prompt",
                remedy="shorten the prompt or drop the row",
            )
        return min(wanted, self.context - len(path))

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False)

    def _trajectory(
        self, request: Request, answer: Answer, node: Node, sampling: Sampling, key: tuple[int, int]
    ) -> Trajectory:
        said = self.read(request, answer)
        finish = self.finish(request, said)
        path = node.path
        prefill, sampled, how = self._counted(request, answer, path, said)
        said, text = self.settle(said, finish, sampling.stop)
        self.usage[how] += 1
        self.retried += answer.attempts - 1
        first, ids = len(path), said.ids
        spans = [Span("prompt", 0, first)]
        if ids is not None:
            spans.append(Span("completion", first, first + len(ids)))
        return Trajectory(
            id=f"{key[0]}/{key[1]}",
            parent=node.id,
            tokens=path + (ids or ()),
            logprobs=said.logprobs,
            weights_version=self.weights_version,
            sampler={
                **{k: getattr(sampling, k) for k in ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "stop", "seed")},
                "item": key[0],
                "sample": key[1],
                "prompts": self.prompts,
            },
            spans=tuple(spans),
            finish=finish,
            text=text,
            cost=Spend(prefill_tokens=prefill * (1 + answer.lost), sampled_tokens=sampled),
            meta={"usage": how, "attempts": answer.attempts, "lost": answer.lost}
            | ({} if said.logprobs is None or ids is not None else {"logprobs_of": len(said.logprobs)}),
        )

    def settle(self, said: Said, finish: Finish, stop: Sequence[str]) -> tuple[Said, str]:
        """What is kept of a completion, and its text."""
        return said, cut(said.text, stop)

    # ---- reading answers

    def read(self, request: Request, answer: Answer) -> Said:
        """The one completion of an answer. Raises MachineError for any other shape, and for another model's answer."""
        data = answer.data
        if data.get("model") != self.model:
            raise MachineError(
                f"asked {self.model!r}, and {data.get('model')!r} answered",
                where=self.endpoint.where(request),
                remedy="name the model exactly as it answers; samples of unknown weights are not used",
            )
        choices = data.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self.unusable(request, "choices: a list of one")
        choice: dict[str, Any] = choices[0]
        text = choice.get("text")
        if self.prompts == "chat":
            message = choice.get("message")
            text = message.get("content") if isinstance(message, dict) else None
            if text is None and isinstance(message, dict) and message.get("refusal"):
                text = str(message["refusal"])
        if not isinstance(text, str):
            raise self.unusable(request, "the text of the completion")
        logprobs = self._logprobs(request, choice.get("logprobs")) if self.logprobs else None
        return Said(text, choice.get("finish_reason"), None, logprobs, choice.get("stop_reason"))

    def _logprobs(self, request: Request, told: Any) -> tuple[float, ...]:
        """Of each sampled token, from the shape of completions or of chat."""
        if isinstance(told, dict) and isinstance(told.get("content"), list):
            values: Any = [x.get("logprob") if isinstance(x, dict) else None for x in told["content"]]
        else:
            values = told.get("token_logprobs") if isinstance(told, dict) else None
        if not isinstance(values, list) or not all(map(is_logprob, values)):
            raise self.unusable(request, "a log-probability for each sampled token")
        return tuple(map(float, values))

    def finish(self, request: Request, said: Said) -> Finish:
        """Why it ended. The API says "stop" for the end token and for a stop string alike, unless there is a reason."""
        if said.finish == "length":
            return "length"
        if said.finish == "stop":
            return "stop_string" if isinstance(said.stop_reason, str) else "stop"
        raise self.unusable(request, f"finish_reason stop or length, not {said.finish!r}")

    def unusable(self, request: Request, wanted: str) -> MachineError:
        remedy = "this is not how an OpenAI-compatible server answers; look at its log"
        return MachineError(f"the answer lacks {wanted}", where=self.endpoint.where(request), remedy=remedy)

    # ---- counting

    def _counted(self, request: Request, answer: Answer, path: tuple[int, ...], said: Said) -> tuple[int, int, str]:
        """Prompt tokens, sampled tokens, and how they are known: counted here, reported by the server, or estimated."""
        usage = answer.data.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        told = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        for name, value in zip(("prompt_tokens", "completion_tokens"), told):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise self.unusable(request, f"a usable usage.{name} (it is {value!r})")
        own = [len(path) if self.prompts == "ids" else None, len(said.ids) if said.ids is not None else None]
        if own[0] is not None and told[0] not in (None, own[0]):
            raise MachineError(
                f"{own[0]} tokens were sent and the server read {told[0]}: it adds or cuts tokens",
                where=self.endpoint.where(request),
                remedy="what it answers is an answer to another prompt; send text, or look at its options",
            )
        found: list[int] = []
        ways: set[str] = set()
        texts = [self.decode(path) if self.prompts == "text" else bytes(path).decode() if self.prompts == "chat" else "", said.text]
        for mine, theirs, text in zip(own, told, texts):
            if mine is not None:
                found.append(mine)
                ways.add("counted")
            elif theirs is not None:
                found.append(theirs)
                ways.add("reported")
            else:
                found.append(self._estimate(text))
                ways.add("estimated")
        how = next(way for way in ("estimated", "reported", "counted") if way in ways)
        return found[0], found[1], how

    def _estimate(self, text: str) -> int:
        if self.tokenizer is not None:
            return len(self.tokenizer.encode(text, add_special_tokens=False))
        return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)

    # ---- what this API cannot do

    def score(self, nodes: Sequence[Node]) -> list[tuple[float, ...]]:
        """See engines.base. Raises ConfigError: this API gives no log-probabilities of tokens it did not sample."""
        raise ConfigError(
            "this API cannot score tokens that it did not sample", where=self.endpoint.url, remedy="use vLLM or the local engine"
        )


def is_logprob(value: Any) -> bool:
    """A finite number that is a log-probability, up to rounding."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value <= 1e-3


def question(model: str, prompts: Prompts, prompt: Any, **more: Any) -> Mapping[str, Any]:
    """The body of a request for one token: what a server is tried with."""
    body: dict[str, Any] = {"model": model, "max_tokens": 1, **more}
    body["messages" if prompts == "chat" else "prompt"] = prompt
    return body
