"""Recipes from YAML: found, read with their lines, overridden, validated; every fault of a recipe is told at once."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from burnish.config.base import on_base
from burnish.config.contradictions import contradictions
from burnish.config.faults import Fault, Key, RecipeError, explain, meant
from burnish.config.overrides import choices, expand, members, override, typed_key, value_at
from burnish.config.provenance import LARGEST, Document, Resolved, dotted, read
from burnish.config.schema import CHOICES, FORMAT, Choice, Recipe
from burnish.core.errors import ConfigError
from burnish.core.grammar import arguments, parse
from burnish.core.table import describe_row, did_you_mean, faults_in, read_number

PACKAGED = Path(__file__).resolve().parents[1] / "recipes"


def packaged() -> dict[str, Path]:
    """The recipes that come with burnish, by name: `first_steps/quickstart`."""
    files = sorted(PACKAGED.rglob("*.yaml"))
    return {path.relative_to(PACKAGED).with_suffix("").as_posix(): path for path in files}


def find(source: str | os.PathLike[str]) -> tuple[Path, str]:
    """(file, what messages call it) for a packaged name or a path. Raises ConfigError with did-you-mean."""
    name, path = os.fspath(source), Path(source)
    if name in packaged():
        return packaged()[name], f"{name}.yaml"
    if os.path.isfile(path):  # False, not an error, where the name cannot be one
        return path, name
    near = [known for known in packaged() if known.rsplit("/", 1)[-1] == path.stem] or None
    hint = f" Did you mean {near[0]!r}?" if near else did_you_mean(name, packaged())
    remedy = f"packaged recipes: {', '.join(packaged())}; a path is seen from {Path.cwd()}"
    raise ConfigError(f"no recipe and no file has this name.{hint}", where=name[:200], remedy=remedy)


def load(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Resolved:
    """Read a packaged recipe or a file, apply `a.b=c` overrides, validate. Raises RecipeError with every fault."""
    return resolve(_document(source), overrides, find(source)[0])


def written(source: str | os.PathLike[str]) -> Document:
    """A recipe as it is written, on its base where it has one; neither overridden nor validated. Raises RecipeError."""
    return _on_its_base(_document(source))


def _on_its_base(document: Document) -> Document:
    data = document.data
    return on_base(document, _document) if isinstance(data, dict) and "base" in data else document


def _document(source: str | os.PathLike[str]) -> Document:
    path, name = find(source)
    return read(_text(path, name), name)


def _text(path: Path, name: str) -> str:
    try:
        data = path.read_bytes()[: LARGEST + 1]
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}", where=name) from error
    remedy = "save the file as UTF-8 without a byte order mark"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError("is UTF-16, wanted UTF-8", where=name, remedy=remedy)
    if data.startswith(b"\xef\xbb\xbf"):
        raise ConfigError("begins with a byte order mark", where=f"{name}:1", remedy=remedy)
    if len(data) > LARGEST:
        raise ConfigError(f"is larger than {LARGEST:,} bytes: that is no recipe", where=name)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        raise ConfigError(message, where=f"{name}:{line}", remedy=remedy) from error


def resolve(document: Document, overrides: Sequence[str] = (), path: Path | None = None) -> Resolved:
    """A recipe from a document already read, see `load`."""
    data = document.data
    if not isinstance(data, dict):
        kind = "empty" if data is None else "a list" if isinstance(data, list) else "a single value"
        message = f"is {kind}, wanted a mapping of keys: burnish, name, model, stages, evals"
        start = Fault(document.name, message, "start from one: burnish cp first_steps/quickstart my.yaml")
        raise RecipeError(document.faults or [start])
    document = _on_its_base(document)
    expand(document)
    override(document, overrides)
    expand(document)
    newer = value_at(document.data, ("burnish",))
    if isinstance(newer, int) and newer > FORMAT:  # its other keys may be new too: no fault of theirs is worth telling
        message = f"burnish: {newer} is a newer recipe format; this burnish reads {FORMAT}"
        raise RecipeError([Fault(document.where(("burnish",)), message, "pip install --upgrade burnish")])
    values = copy.deepcopy(document.data)
    faults = [*document.faults, *_bind(document, values)]
    recipe, more = _validate(document, values)
    if recipe is None or faults or more:
        raise RecipeError(sorted(dict.fromkeys((*faults, *more)), key=_by_place))
    contrary = [_fault(document, *problem) for problem in contradictions(recipe)]
    if contrary:
        raise RecipeError(sorted(contrary, key=_by_place))
    provenance = {dotted(key): document.origin(key) for key in _leaves(recipe.model_dump(mode="json"), ())}
    return Resolved(recipe, provenance, path, document.text)


def _by_place(fault: Fault) -> tuple[str, int]:
    name, _, line = fault.where.rpartition(":")
    return (name, int(line)) if line.isdigit() else (fault.where, 0)


def _leaves(value: Any, key: Key) -> Iterator[Key]:
    if not isinstance(value, (dict, list)) or not value:
        yield key
        return
    items = cast(Any, value).items() if isinstance(value, dict) else enumerate(cast(list[Any], value))
    for name, child in items:
        yield from _leaves(child, (*key, name))


def _fault(document: Document, key: Key, message: str, remedy: str | None = None) -> Fault:
    """A fault at a key; where an override put it there, the place already names the key."""
    where = document.where(key)
    name = typed_key(document, key)
    return Fault(where, message if not name or where == f"--set {name}" else f"{name}: {message}", remedy)


# ---- rows of tables -------------------------------------------------------------------------------------------------


def _bind(document: Document, values: Any) -> Iterator[Fault]:
    """Check every name of a row and its parameters against the descriptions; fill the parameters in."""
    for kind, key in choices(values):
        choice = value_at(values, key)
        if kind == "schedule" and choice is None and isinstance(value_at(values, key[:-1]), dict):
            choice = {"name": "constant"}
        name = value_at(choice, ("name",))
        if not isinstance(name, str) or not isinstance(choice, dict):
            continue
        fields = CHOICES.get(kind, Choice).model_fields
        params = {k: v for k, v in cast(dict[str, Any], choice).items() if k not in fields}
        try:
            row = describe_row(kind, name)
        except ConfigError as error:
            yield _fault(document, (*key, "name"), error.message, error.remedy)
            continue
        bound, faults = faults_in(row, params)
        for parameter, message in faults:
            yield _fault(document, (*key, parameter), message)
        for parameter in bound.keys() & params.keys():
            _note_number(document, (*key, parameter), params[parameter], bound[parameter])
        value_at(values, key[:-1])[key[-1]] = {**choice, **bound}
    for key in _tasks(values):
        if isinstance(task := value_at(values, key), str):
            try:
                describe_row("task", task)
            except ConfigError as error:
                yield _fault(document, key, error.message, error.remedy)
    for name in _evals(values):
        key = ("evals", name, "strategies")
        for i, text in enumerate(members(value_at(values, key))):
            yield from _strategy(document, (*key, i), text)


def _tasks(values: Any) -> Iterator[Key]:
    for i, stage in enumerate(members(value_at(values, ("stages",)))):
        for j in range(len(members(value_at(stage, ("data",))))):
            yield ("stages", i, "data", j, "task")
    for name in _evals(values):
        yield ("evals", name, "task")


def _evals(values: Any) -> list[str]:
    evals = value_at(values, ("evals",))
    return list(cast(dict[str, Any], evals)) if isinstance(evals, dict) else []


def _strategy(document: Document, key: Key, text: Any) -> Iterator[Fault]:
    try:
        spec = parse(text if isinstance(text, str) else "")
    except ConfigError:
        return  # the schema says what is wrong with its form
    try:
        _, faults = arguments(spec)
    except ConfigError as error:
        yield _fault(document, key, error.message, error.remedy)
    else:
        for message in faults:
            yield _fault(document, key, f"{spec}: {message}")


# ---- the schema -----------------------------------------------------------------------------------------------------


def _note_number(document: Document, key: Key, typed: Any, number: Any) -> None:
    if isinstance(typed, str) and not isinstance(number, str):
        document.notes[key] = f"the text {typed} read as the number {number!r}"


def _validate(document: Document, values: Any) -> tuple[Recipe | None, list[Fault]]:
    """The recipe, or what is wrong with it. Text like `1e-5` becomes a number where the schema wants one."""
    try:
        return Recipe.model_validate_json(json.dumps(values), strict=True), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
    found = {(_key(values, e["loc"], e["type"]), e["type"]): e for e in errors}
    read_again = False
    for key, kind in found:
        typed = value_at(values, key)
        number = read_number(typed)
        if kind in ("int_type", "float_type") and isinstance(typed, str) and number != typed:
            value_at(values, key[:-1])[key[-1]] = number
            _note_number(document, key, typed, number)
            read_again = True
    if read_again:
        return _validate(document, values)
    keys = {key for key, _ in found}
    misspelt = {meant(key) for key, kind in found if kind == "extra_forbidden"}
    faults: dict[Key, Fault] = {}
    for (key, kind), e in found.items():
        deeper = any(other[: len(key)] == key and other != key for other in keys)  # a union has one error a member
        told = key in faults or key in document.spoilt or (kind == "missing" and key in misspelt)
        if not told and not deeper:
            faults[key] = _fault(document, key, *explain(key, e, document.typed.get(key, "")))
    return None, list(faults.values())


def _key(values: Any, location: tuple[int | str, ...], kind: str) -> Key:
    """The recipe's key of a pydantic location, which also names members of unions."""
    key: Key = ()
    for part in location:
        around = value_at(values, key)
        named = part in cast(dict[str, Any], around) if isinstance(around, dict) else isinstance(part, int)
        if kind == "missing" or (named and isinstance(around, (dict, list))):
            key = (*key, part)
    return key
