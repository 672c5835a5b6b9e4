"""The vLLM server: token ids in and out, log-probabilities of sampled tokens and of prompts, end tokens by id.

Three of its habits are answered here. It fills what a request leaves out from the model's generation_config (a repetition
penalty, say), so everything is said. It looks for stop strings in the text without special tokens unless told otherwise.
And it may return tokens past a stop string (speculative decoding), which are not part of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from burnish.core.errors import ConfigError, MachineError
from burnish.core.records import Finish, Sampling, Spend
from burnish.engines.base import Node, cut
from burnish.engines.endpoint import Answer, Endpoint, Request
from burnish.engines.remote import RemoteEngine, Said, is_logprob

SINCE = "0.10.2"  # the first vLLM whose answers hold token ids


class VllmEngine(RemoteEngine):
    """See RemoteEngine. `logprobs=False` where the server was started with processed log-probabilities, or gives none.

    tokenizer: text is decoded here, from the ids, as the local engine does.
    """

    kind = "vllm"

    def __init__(self, endpoint: Endpoint, model: str, *, tokenizer: Any, logprobs: bool = True, **more: Any) -> None:
        if tokenizer is None:
            raise ConfigError("needs the model's tokenizer", where="engine", remedy="give one: --tokenizer FOLDER")
        super().__init__(endpoint, model, tokenizer=tokenizer, prompts="ids", logprobs=logprobs, **more)

    @property
    def can(self) -> frozenset[str]:
        return frozenset({"ids", "logprobs", "score"} if self.logprobs else {"ids"})

    def check(self, sampling: Sampling) -> None:
        """See RemoteEngine. vLLM cuts by min-p before top-p, burnish after: together they are two distributions."""
        if sampling.min_p > 0 and sampling.top_p < 1:
            raise ConfigError("vLLM and burnish cut by min_p and top_p in another order", where="sampling.min_p", remedy="use one of the two")

    def body(self, path: tuple[int, ...], sampling: Sampling) -> dict[str, Any]:
        """See RemoteEngine."""
        made = super().body(path, sampling) | {
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(self.end_ids),
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "return_token_ids": True,
        }
        if self.logprobs:
            made["logprobs"] = 0  # of the sampled token alone
        return made

    def read(self, request: Request, answer: Answer) -> Said:
        """See RemoteEngine; with the ids."""
        said = super().read(request, answer)
        choice: dict[str, Any] = answer.data["choices"][0]
        ids, prompt = choice.get("token_ids"), choice.get("prompt_token_ids")
        if ids is None or prompt is None:
            raise MachineError(
                "the answer holds no token ids", where=self.endpoint.where(request), remedy=f"vLLM gives them since {SINCE}: update the server"
            )
        if not isinstance(ids, list) or not ids or not all(isinstance(t, int) and t >= 0 for t in ids):
            raise self.unusable(request, "the ids of the sampled tokens")
        if request.body is None or prompt != request.body["prompt"]:
            raise MachineError("it answered another prompt than was sent", where=self.endpoint.where(request))
        if said.logprobs is not None and len(said.logprobs) != len(ids):
            raise self.unusable(request, f"a log-probability for each of {len(ids)} tokens (it has {len(said.logprobs)})")
        return replace(said, ids=tuple(ids))

    def settle(self, said: Said, finish: Finish, stop: Sequence[str]) -> tuple[Said, str]:
        """Ids up to the one that completes a stop string; the text from the ids, as the local engine has it."""
        ids = said.ids or ()
        if finish == "stop_string":
            tail = max(len(s.encode()) for s in stop) + 8 if stop else 0
            whole = (i for i in range(1, len(ids)) if any(s in self.decode(ids[max(0, i - tail) : i], True) for s in stop))
            if (end := next(whole, None)) is not None:
                ids = ids[:end]
                said = replace(said, ids=ids, logprobs=None if said.logprobs is None else said.logprobs[:end])
        return said, cut(self.decode(ids[:-1] if finish == "stop" else ids), stop)

    def score(self, nodes: Sequence[Node]) -> list[tuple[float, ...]]:
        """See engines.base: one request for each path that no longer one covers; the server samples a token it must."""
        if not self.logprobs:
            return super().score(nodes)
        below = {above for node in nodes for above in self._held(node).chain[:-1]}
        leaves = [node for node in dict.fromkeys(nodes) if node not in below]
        requests = [
            Request("POST", "/completions", self._scoring(node.path), f"scoring {i + 1} of {len(leaves)}")
            for i, node in enumerate(leaves)
        ]
        asked = set(nodes)
        scores: dict[Node, tuple[float, ...]] = {}

        def took(i: int, answer: Answer) -> None:
            said = self.read(requests[i], answer)
            values = self._prompt_logprobs(requests[i], answer)
            fresh = 0
            for node in leaves[i].chain:
                if node not in scores:
                    scores[node] = values[max(node.start, 1) - 1 : node.end - 1]
                    fresh += len(scores[node]) if node in asked else 0
            sent = len(leaves[i].path) * (1 + answer.lost)
            self.retried += answer.attempts - 1
            self.spend += Spend(prefill_tokens=sent - fresh, scored_tokens=fresh, sampled_tokens=len(said.ids or ()))

        self.endpoint.ask_all(requests, took, self.poll)
        return [scores[node] for node in nodes]

    def _scoring(self, path: tuple[int, ...]) -> dict[str, Any]:
        self.room(path, 1)
        return self.body(path, Sampling(temperature=0.0, max_new_tokens=1)) | {"prompt_logprobs": 0}

    def _prompt_logprobs(self, request: Request, answer: Answer) -> tuple[float, ...]:
        """Of each token of the prompt but the first, which has none."""
        assert request.body is not None
        path: list[int] = request.body["prompt"]
        told = answer.data["choices"][0].get("prompt_logprobs")
        if not isinstance(told, list) or len(told) != len(path):
            raise self.unusable(request, "a log-probability for each token of the prompt")
        found = [(at or {}).get(str(token), {}).get("logprob") for token, at in zip(path[1:], told[1:])]
        if not all(map(is_logprob, found)):
            raise self.unusable(request, "a log-probability for each token of the prompt")
        return tuple(map(float, found))
