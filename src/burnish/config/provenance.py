"""Where every value of a recipe came from: YAML read with its lines, and written back with them as comments."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from burnish.config.faults import Fault, Key, RecipeError
from burnish.config.schema import Recipe

LARGEST = 1_000_000  # bytes of recipe: more is data, and aliases could make it endless
MOST = 20_000  # values
DEEPEST = 20


@dataclass
class Document:
    """Plain data read from YAML, the place each key came from, and each scalar as it was typed."""

    name: str
    text: str = ""
    data: Any = None
    places: dict[Key, str] = field(default_factory=dict[Key, str])
    typed: dict[Key, str] = field(default_factory=dict[Key, str])
    notes: dict[Key, str] = field(default_factory=dict[Key, str])
    spoilt: dict[Key, str] = field(default_factory=dict[Key, str])  # scalars that are faults already
    faults: list[Fault] = field(default_factory=list[Fault])

    def where(self, key: Key) -> str:
        """The place of a key, or of the nearest key around it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.name)

    def origin(self, key: Key) -> str:
        """Where the value of a key came from: a place with its note, or `default`."""
        value = self.data
        for part in key:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return "default"
        note = self.notes.get(key)
        return f"{self.where(key)}, {note}" if note else self.where(key)

    def replace(self, key: Key, other: Document) -> None:
        """Take places and typed text below `key` from another document (an override)."""
        pairs = (self.places, other.places), (self.typed, other.typed), (self.spoilt, other.spoilt)
        for mine, theirs in pairs:
            for old in [k for k in mine if k[: len(key)] == key]:
                del mine[old]
            mine.update({(*key, *k): v for k, v in theirs.items()})


@dataclass(frozen=True)
class Resolved:
    """A recipe ready to run. `provenance` maps every dotted key to `file:line`, `--set key` or `default`."""

    recipe: Recipe
    provenance: dict[str, str]
    path: Path | None
    text: str


def dotted(key: Key) -> str:
    return ".".join(map(str, key))


def read(text: str, name: str) -> Document:
    """YAML 1.1 as PyYAML's safe loader understands it, except that nothing is guessed: see `_scalar`.

    Faults that leave the rest readable (a key given twice) are collected; a text that is no YAML raises RecipeError.
    """
    document = Document(name, text)
    try:
        node: yaml.Node | None = yaml.SafeLoader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None or name.startswith("--set") else f"{name}:{mark.line + 1}"
        problem = " ".join(filter(None, [error.context, error.problem]))
        if "\\t" in problem:
            problem = "a tab where YAML wants spaces"
        raise RecipeError([Fault(where, f"is not YAML: {problem}", _yaml_remedy(problem))]) from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise RecipeError([Fault(name, f"is not YAML: {reason}")]) from error
    document.data = None if node is None else _build(document, node, (), [MOST])
    return document


def _yaml_remedy(problem: str) -> str | None:
    if "tab where" in problem:
        return "indent with spaces"
    if "flow" in problem:
        return "close what is open: ] } or a quote"
    if "mapping values are not allowed" in problem:
        return "quote a text that holds a colon, and put every key on its own line"
    if "single document" in problem:
        return "a recipe is one document: remove the second ---"
    return None


def _build(document: Document, node: yaml.Node, key: Key, left: list[int]) -> Any:
    """Data from a node. `left` is how many more nodes may be built: aliases can multiply them."""
    line = node.start_mark.line + 1
    here = document.name if document.name.startswith("--set") else f"{document.name}:{line}"
    document.places.setdefault(key, here)
    left[0] -= 1
    if left[0] < 0 or len(key) > DEEPEST:
        raise RecipeError([Fault(here, "is nested too deeply, or repeats itself through an alias")])
    if isinstance(node, yaml.ScalarNode):
        document.typed[key] = node.value
        return _scalar(document, node, key, here)
    if isinstance(node, yaml.SequenceNode):
        return [_build(document, item, (*key, i), left) for i, item in enumerate(node.value)]
    found: dict[str, Any] = {}
    for name, value in node.value:
        at = here if here == document.name else f"{document.name}:{name.start_mark.line + 1}"
        if not isinstance(name, yaml.ScalarNode):
            document.faults.append(Fault(at, "a key must be a word, not a list or a mapping"))
            continue
        word = name.value  # as typed: `on:` and `1:` are keys like any other
        if word in found:
            first = document.places[(*key, word)]
            document.faults.append(
                Fault(at, f"{dotted((*key, word))}: given twice, first at {first}", "keep one of the two")
            )
            continue
        document.places[(*key, word)] = at
        found[word] = _build(document, value, (*key, word), left)
    return found


def _scalar(document: Document, node: yaml.ScalarNode, key: Key, where: str) -> Any:
    """The value of a scalar. YAML 1.1 reads 010 as 8 and 1:30 as 90: those are refused; dates stay text."""
    kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
    digits = text.replace("_", "")
    match kind:
        case "str" | "timestamp" if not re.search("[\ud800-\udfff]", text):
            return text
        case "null":
            return None
        case "bool":
            return text.lower() in ("yes", "true", "on")
        case "int" if re.fullmatch(r"[-+]?(0|[1-9]\d{0,300})", digits):
            return int(digits)
        case "float" if ":" not in text:
            return float(digits.lower().replace(".inf", "inf").replace(".nan", "nan"))
        case "int" | "float" | "str" | "timestamp":
            read = "half of a surrogate pair" if kind in ("str", "timestamp") else "a number in another base"
            message, remedy = f"YAML reads {text[:40]!a} as {read}", "write a decimal number, or quote it"
        case _:
            message, remedy = f"the tag !!{kind[:40]} has no place in a recipe", "write the plain value"
    document.faults.append(Fault(where, f"{dotted(key)}: {message}" if key else message, remedy))
    document.spoilt[key] = text
    return None


# ---- writing --------------------------------------------------------------------------------------------------------


def write(resolved: Resolved) -> str:
    """The recipe with every value spelled out; each one that is not a default says where it came from.

    `load` reads the text back to an equal recipe.
    """
    head = "# Every value of this run. A comment says where a value came from; without one it is the default.\n"
    return head + "".join(f"{line}\n" for line in _lines(resolved.recipe.model_dump(mode="json"), (), resolved, ""))


def _lines(section: dict[str, Any], key: Key, resolved: Resolved, indent: str) -> Iterable[str]:
    for name, value in section.items():
        below = (*key, name)
        label = f"{indent}{_text(name)}:"
        items = cast(list[Any], value) if isinstance(value, list) else []
        if value and isinstance(value, dict):
            yield label
            yield from _lines(cast(dict[str, Any], value), below, resolved, indent + "  ")
        elif items and isinstance(items[0], dict):
            yield label
            for i, item in enumerate(items):
                first, *rest = _lines(item, (*below, i), resolved, indent + "    ")
                yield f"{indent}  - {first.lstrip()}"
                yield from rest
        else:
            keys = [(*below, i) for i in range(len(items))] or [below]
            origins = dict.fromkeys(resolved.provenance.get(dotted(k), "default") for k in keys)
            told = [o for o in origins if o != "default" and not any(other.startswith(f"{o},") for other in origins)]
            said = re.sub("[^ -~]", "?", "; ".join(told))
            text = f"[{', '.join(map(_text, items))}]" if isinstance(value, list) else _text(value)
            yield f"{label} {text}" + (f"  # {said}" if said else "")


def _text(value: Any) -> str:
    """One value on one line, quoted where YAML would read something else."""
    if not isinstance(value, str):
        return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    if re.fullmatch(r"[A-Za-z_./][\w./+@() -]*(:[\w@()]+)*", value, re.ASCII) and yaml.safe_load(f"[{value}]") == [
        value
    ]:
        return value
    return yaml.safe_dump(value, default_style='"', width=10**9, allow_unicode=False).strip()
