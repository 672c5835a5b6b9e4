"""Short forms written out, and `--set a.b=c` put in its place, before anything is validated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from burnish.config.faults import Fault, Key, RecipeError
from burnish.config.provenance import Document, dotted, read
from burnish.core.table import shown


def typed_key(document: Document, key: Key) -> str:
    """`stages.sft.train`: as one would type it after --set."""
    if len(key) > 1 and key[0] == "stages":
        name = value_at(document.data, (*key[:2], "name"))
        key = (key[0], name, *key[2:]) if isinstance(name, str) and name else key
    return dotted(key)


def value_at(value: Any, key: Key) -> Any:
    """The value at a key, or None."""
    for part in key:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def members(value: Any) -> list[Any]:
    return cast(list[Any], value) if isinstance(value, list) else []


def choices(data: Any) -> Iterator[tuple[str, Key]]:
    """(kind of table, key) of every place that names a row with parameters."""
    for i in range(len(members(value_at(data, ("stages",))))):
        yield "method", ("stages", i, "method")
        yield "adapter", ("stages", i, "adapter")
        yield "schedule", ("stages", i, "train", "schedule")
        rewards: Key = ("stages", i, "rewards")
        yield "combine", (*rewards, "combine")
        yield "segmenter", (*rewards, "steps")
        for j in range(len(members(value_at(data, (*rewards, "use"))))):
            yield "reward", (*rewards, "use", j)


def expand(document: Document) -> None:
    """Write short forms out: `method: sft` is `method: {name: sft}`, one source is a list of one, and so is a reward."""
    for i, stage in enumerate(members(value_at(document.data, ("stages",)))):
        if isinstance(source := value_at(stage, ("data",)), dict):
            stage["data"] = [source]
            _shift(document, ("stages", i, "data"), (0,))
        key: Key = ("stages", i, "rewards")
        rewards = value_at(stage, ("rewards",))
        if isinstance(rewards, (str, list)) or (isinstance(rewards, dict) and "name" in rewards):
            stage["rewards"] = {"use": rewards}
            _shift(document, key, ("use",))
        if isinstance(use := value_at(stage, ("rewards", "use")), (str, dict)):
            stage["rewards"]["use"] = [use]
            _shift(document, (*key, "use"), (0,))
    for _, key in choices(document.data):
        if isinstance(name := value_at(document.data, key), str):
            value_at(document.data, key[:-1])[key[-1]] = {"name": name}
            document.places[(*key, "name")] = document.where(key)
            document.typed[(*key, "name")] = document.typed.get(key, name)


def _shift(document: Document, key: Key, under: Key) -> None:
    """Places and typed text of what stood at `key` now stand at `key + under`; those at `key` itself stay too."""
    for table in (document.places, document.typed, document.spoilt):
        below = {k: v for k, v in table.items() if k[: len(key)] == key}
        table.update({(*key, *under, *k[len(key) :]): v for k, v in below.items()})


def override(document: Document, overrides: Sequence[str]) -> None:
    """Put the value of every `a.b=c` in its place. Faults are collected in the document."""
    seen: set[str] = set()
    for text in overrides:
        name, equals, value = text.partition("=")
        place = f"--set {name.strip()}"
        if not equals or not name.strip():
            document.faults.append(Fault(f"--set {text}", "wanted key=value", "type --set stages.sft.train.steps=10"))
        elif name.strip() in seen:
            document.faults.append(Fault(place, "given twice", "keep one of the two"))
        else:
            seen.add(name.strip())
            try:
                put(document, name.strip().split("."), read(value, place))
            except RecipeError as error:
                document.faults.extend(error.faults)


def put(document: Document, parts: list[str], value: Document) -> None:
    """Walk to the place of an override, making the mappings on the way, and leave its value there."""
    container, key = document.data, cast(Key, ())
    for i, part in enumerate(parts):
        step: str | int = part
        if isinstance(container, list):
            entries = cast(list[Any], container)
            names = [value_at(entry, ("name",)) for entry in entries]
            if part in names or part.isdigit():
                step = names.index(part) if part in names else int(part)
            elif len(entries) == 1 and key[-1] == "data":  # the only source needs no index
                container, key = entries[0], (*key, 0)
            else:
                step = len(entries)
            if isinstance(step, int) and step >= len(entries):
                named = [name for name in names if isinstance(name, str)]
                remedy = f"name one of: {', '.join(named)}" if named else f"count from 0 to {len(entries) - 1}"
                message = f"{typed_key(document, key)} has {len(entries)} entries, and {part!r} is none of them"
                raise RecipeError([Fault(value.name, message, remedy)])
        elif not isinstance(container, dict):
            message = f"{typed_key(document, key)} is {shown(container)}, which has no key {part!r}"
            raise RecipeError([Fault(value.name, message)])
        key = (*key, step)
        if i < len(parts) - 1 and value_at(container, (step,)) is None:
            cast(Any, container)[step] = {}
            document.places[key] = value.name
        if i < len(parts) - 1:
            container = cast(Any, container)[step]
        else:
            cast(Any, container)[step] = value.data
    document.replace(key, value)
    document.faults.extend(value.faults)
