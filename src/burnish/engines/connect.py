"""From an address to an engine: what the server is, which models it has, and what it can do, asked of it and tried.

Trying costs a token or two. What a server says of itself is not enough: one that takes token ids may still add its own,
and one that gives log-probabilities may give those of the cut and tempered distribution, which training cannot use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from burnish.core.errors import ConfigError, MachineError
from burnish.core.table import did_you_mean
from burnish.engines.endpoint import Answer, Endpoint, Refused, Request
from burnish.engines.remote import PATH, Prompts, RemoteEngine, is_logprob, question
from burnish.engines.vllm import VllmEngine

Api = Literal["auto", "vllm", "completions", "chat"]
CERTAIN = -1e-3  # a log-probability above this is that of a token nearly certain


def models(endpoint: Endpoint) -> dict[str, dict[str, Any]]:
    """Name -> card of every model the server has. Raises ConfigError, MachineError: what to type instead is in them."""
    request = Request("GET", "/models")
    try:
        listed = endpoint.ask(request, attempts=1).data.get("data")
    except Refused as error:
        if error.status not in (404, 405):
            raise
        remedy = "type the address of an OpenAI-compatible server, up to its /v1"
        raise ConfigError("there is no list of models here", where=endpoint.where(request), remedy=remedy) from error
    if not isinstance(listed, list) or not all(isinstance(m, dict) and isinstance(m.get("id"), str) for m in listed):
        raise MachineError("the answer is no list of models", where=endpoint.where(request))
    return {card["id"]: card for card in listed}


def connect(
    endpoint: Endpoint,
    model: str,
    *,
    api: Api = "auto",
    tokenizer: Any = None,
    end_ids: Sequence[int] = (),
    version: str = "",
    poll: Callable[[], None] | None = None,
) -> RemoteEngine:
    """An engine that says truthfully what it can do. See RemoteEngine for the arguments.

    api  auto: vLLM where the server is one, else completions; chat has to be asked for, because it renders prompts itself
    Raises ConfigError (no such model, no such API, no tokenizer where one is needed), MachineError.
    """
    cards = models(endpoint)
    if model not in cards:
        known = ", ".join(list(cards)[:8]) or "none"
        hint = did_you_mean(model, cards)
        raise ConfigError(f"the server has no model {model!r}.{hint}", where=endpoint.url, remedy=f"it has: {known}")
    card = cards[model]
    if api == "auto":
        api = "vllm" if _is_vllm(card, cards) else "completions"
    common: dict[str, Any] = {"tokenizer": tokenizer, "end_ids": end_ids, "version": version, "poll": poll}
    limits = (card.get("max_model_len"), cards.get(str(card.get("parent")), {}).get("max_model_len"))
    common["context"] = next((n for n in limits if isinstance(n, int) and n > 0), None)
    if api == "chat":
        honest = _honest(endpoint, model, "chat", [{"role": "user", "content": "a"}])
        return RemoteEngine(endpoint, model, prompts="chat", logprobs=honest, **common)
    if tokenizer is None:
        remedy = "give its folder or hub id with --tokenizer, or let the server render them with --api chat"
        raise ConfigError("prompts are rendered here, with the model's tokenizer", where="engine", remedy=remedy)
    ids = tuple(tokenizer.encode("a", add_special_tokens=False))
    if api == "vllm":
        return VllmEngine(endpoint, model, logprobs=_honest(endpoint, model, "ids", list(ids), top_k=1), **common)
    takes = _takes_ids(endpoint, model, ids)
    prompt = list(ids) if takes else "a"
    honest = _honest(endpoint, model, "ids" if takes else "text", prompt)
    return RemoteEngine(endpoint, model, prompts="ids" if takes else "text", logprobs=honest, **common)


def _is_vllm(card: dict[str, Any], cards: dict[str, dict[str, Any]]) -> bool:
    """Its cards say so; an adapter's names its base model."""
    return "vllm" in (card.get("owned_by"), cards.get(str(card.get("parent")), {}).get("owned_by"))


def _takes_ids(endpoint: Endpoint, model: str, ids: Sequence[int]) -> bool:
    """Whether token ids are accepted as a prompt, and read as they are."""
    request = Request("POST", PATH["ids"], question(model, "ids", list(ids)), "trying token ids")
    try:
        usage = endpoint.ask(request).data.get("usage")
    except Refused as error:
        if error.status in (404, 405):
            remedy = "let the server render prompts: --api chat"
            raise ConfigError("the server has no completions", where=endpoint.where(request), remedy=remedy) from error
        if error.status in (400, 415, 422):
            return False
        raise
    return isinstance(usage, dict) and usage.get("prompt_tokens") == len(ids)


def _honest(endpoint: Endpoint, model: str, prompts: Prompts, prompt: Any, **more: Any) -> bool:
    """Whether log-probabilities are those of the model itself, at temperature 1 with nothing cut away.

    One token is drawn from a distribution with almost all of its mass on one token. If its log-probability is that
    of certainty, it was taken after the cut; or the model is certain of what follows, which cannot be told apart.
    """
    asked = True if prompts == "chat" else 1
    settings = {"temperature": 0.02, "top_p": 0.001, "seed": 0, "logprobs": asked, **more}
    request = Request("POST", PATH[prompts], question(model, prompts, prompt, **settings), "trying log-probabilities")
    try:
        value = _first_logprob(endpoint.ask(request))
    except Refused as error:
        if error.status in (404, 405):
            raise ConfigError(f"the server has no {PATH[prompts]}", where=endpoint.where(request), remedy="use another --api") from error
        if error.status in (400, 415, 422):
            return False
        raise
    return is_logprob(value) and value < CERTAIN


def _first_logprob(answer: Answer) -> Any:
    try:
        told = answer.data["choices"][0]["logprobs"]
        return told["content"][0]["logprob"] if told.get("content") else told["token_logprobs"][0]
    except (AttributeError, IndexError, KeyError, TypeError):
        return None
