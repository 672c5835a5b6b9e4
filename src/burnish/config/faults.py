"""What is wrong with a recipe, in words: where, what was given, what was wanted, what to type instead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from burnish.config.schema import ELSEWHERE, SECTIONS, Recipe
from burnish.core.errors import ConfigError
from burnish.core.table import did_you_mean, nearest, shown

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a recipe: where (`file:line` or `--set key`), what, and what to type instead."""

    where: str
    message: str
    remedy: str | None = None

    def render(self) -> str:
        return f"{self.where}  {self.message}" + (f"\n    {self.remedy}" if self.remedy else "")


class RecipeError(ConfigError):
    """Everything wrong with a recipe, at once."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        if len(self.faults) == 1:
            (fault,) = self.faults
            super().__init__(fault.message, where=fault.where, remedy=fault.remedy)
        else:
            lines = "\n".join(f"  {fault.render()}" for fault in self.faults)
            super().__init__(f"the recipe has {len(self.faults)} faults\n{lines}")


def explain(key: Key, error: Any, typed: str) -> tuple[str, str | None]:
    """(message, remedy) of one pydantic error at a key whose scalar was typed so."""
    info = _field(key)[1]
    last = next((part for part in reversed(key) if isinstance(part, str)), "")
    given, kind = error["input"], error["type"]
    wanted = info.description if info else None
    example = info.examples[0] if info and info.examples else None
    remedy = f"type {last}: {example}" if example is not None else None
    if kind == "extra_forbidden":
        return _unknown_key(key)
    if isinstance(cause := error.get("ctx", {}).get("error"), ConfigError):
        return cause.message, cause.remedy
    if kind == "missing":
        return f"is missing, wanted {wanted}", f"add {last}: {example}" if example is not None else None
    if kind == "string_type" and isinstance(given, (bool, int, float)):
        what = f"the truth value {json.dumps(given)}" if isinstance(given, bool) else "a number"
        return f"{typed} without quotes is {what} to YAML, wanted text", f'type {last}: "{typed}"'
    if kind in ("int_type", "float_type") and isinstance(given, str) and re.fullmatch(r"[-+]?[\d.]+", given):
        remedy = f"remove the quotes: {last}: {given}"
    message = f"{typed if isinstance(given, bool) and typed else shown(given)} given, wanted {wanted or error['msg']}"
    if kind == "literal_error" and isinstance(given, str):
        hint = did_you_mean(given, re.findall(r"'([^']+)'", error["ctx"]["expected"]))
        message = f"{message}.{hint}" if hint else message
    return message, remedy


def meant(key: Key) -> Key | None:
    """The key that an unknown one was probably meant to be: a neighbour by spelling, or by another trainer's name."""
    fields, word = _field(key)[0].model_fields, str(key[-1])
    near = ELSEWHERE[word] if ELSEWHERE.get(word) in fields else nearest(word, fields)
    return (*key[:-1], near) if near else None


def _unknown_key(key: Key) -> tuple[str, str | None]:
    """What to say of a key that is not there: which was meant, or where it belongs."""
    if near := meant(key):
        return f"no such key. Did you mean {near[-1]!r}?", None
    homes = [home for home, section in SECTIONS.items() if key[-1] in section.model_fields]
    hint = f" It is a key of {' and of '.join(homes)}; is the indentation right?" if homes else ""
    return f"no such key.{hint}", f"the keys here: {', '.join(_field(key)[0].model_fields)}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as `tuple[Stage, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


def _field(key: Key) -> tuple[type[BaseModel], FieldInfo | None]:
    """(the model around a key, the field it is)."""
    model: type[BaseModel] = Recipe
    info: FieldInfo | None = None
    inside_mapping = False
    for i, part in enumerate(key):
        if isinstance(part, int) or inside_mapping:
            inside_mapping = False
            continue
        info = model.model_fields.get(part)
        inner = _section(info.annotation) if info else None
        if info is None or inner is None:
            break
        inside_mapping = get_origin(info.annotation) is dict
        if i < len(key) - 1:
            model = inner
    return model, info
