"""A `rewards` block outside a recipe: from Python, or from the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from burnish.config.contradictions import rewards_against
from burnish.config.provenance import dotted
from burnish.config.schema import Choice, Reward, Rewards
from burnish.core.errors import ConfigError
from burnish.core.table import bind, describe_row, shown


def read_block(block: Rewards | Mapping[str, Any] | Sequence[Any] | str) -> Rewards:
    """A validated block from the forms a recipe may write: a name, a reward, a list of them, or the whole mapping.

    Raises ConfigError that names the key; rows are described, never executed.
    """
    if not isinstance(block, Rewards):
        alone = isinstance(block, str) or (isinstance(block, Mapping) and "name" in block)
        whole = {"use": [block] if alone else block} if alone or not isinstance(block, Mapping) else dict(block)
        use: Any = whole.get("use")
        entries: list[Any] = [use] if isinstance(use, (str, Mapping)) else list(use or ())
        whole["use"] = [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
        for key in ("combine", "steps"):
            if isinstance(whole.get(key), str):
                whole[key] = {"name": whole[key]}
        block = _validated(whole)
    use = tuple(_bound("reward", reward, f"rewards.use.{i}") for i, reward in enumerate(block.use))
    combine = _bound("combine", block.combine, "rewards.combine")
    steps = None if block.steps is None else _bound("segmenter", block.steps, "rewards.steps")
    block = block.model_copy(update={"use": use, "combine": combine, "steps": steps})
    for key, message, remedy in rewards_against(block, ("rewards",)):
        raise ConfigError(message, where=dotted(key), remedy=remedy)
    return block


def _validated(whole: Mapping[str, Any]) -> Rewards:
    try:
        return Rewards.model_validate_json(json.dumps(whole), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = dotted(("rewards", *first["loc"]))
        raise ConfigError(f"{shown(first['input'])} given: {first['msg']}", where=key) from error
    except TypeError as error:
        raise ConfigError(f"is no plain data: {error}", where="rewards") from error


def _bound(kind: str, choice: Choice, where: str) -> Choice:
    row = describe_row(kind, choice.name)
    fields = (Reward if kind == "reward" else Choice).model_fields
    own = {name: getattr(choice, name) for name in fields}
    return type(choice)(**{**own, **bind(row, choice.params, where)})
