"""Tables: name -> pure function whose keyword-only parameters are its config schema, readable without running it.

`describe` parses source with `ast`, so listing, checking and showing rows never imports torch and never executes a
user's file; `load_table` and `load_row` import. A test holds description and live signature equal for every row.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError, ConfigError
from burnish.core.signature import (
    Inputs,
    Parameter,
    Source,
    fields_of,
    find,
    inputs_of,
    literal,
    parameters_of,
    read_module,
    read_source,
    unreadable,
    wanted,
)

TABLES: dict[str, tuple[str, ...]] = {
    "method": (
        "burnish.methods.supervised:METHODS",
        "burnish.maths.settings:POLICY_GRADIENT",
        "burnish.methods.rejection:REJECTION",
        "burnish.methods.trpo:TRPO",
        "burnish.methods.astar_po:ASTAR_PO",
        "burnish.methods.mrt:MRT",
        "burnish.methods.mixer:MIXER",
        "burnish.methods.oreo:OREO",
    ),
    "weights": ("burnish.maths.weights:WEIGHTS",),
    "schedule": ("burnish.train.schedules:SCHEDULES",),
    "adapter": ("burnish.models.adapters:ADAPTERS",),
    "mask": ("burnish.data.masks:MASKS",),
    "task": ("burnish.data.tasks.table:TASKS",),
    "strategy": ("burnish.search.sampling:STRATEGIES",),
    "scorer": ("burnish.search.scorers:SCORERS",),
    "advantage": ("burnish.maths.advantages:ADVANTAGES",),
    "ratio": ("burnish.maths.ratios:RATIOS",),
    "surrogate": ("burnish.maths.surrogates:SURROGATES",),
    "correction": ("burnish.maths.ratios:CORRECTIONS",),
    "kl": ("burnish.maths.divergences:KLS",),
    "sequence_filters": ("burnish.maths.filters:SEQUENCE_FILTERS",),
    "token_filters": ("burnish.maths.filters:TOKEN_FILTERS",),
    "reward": (
        "burnish.rewards.answers:ANSWERS",
        "burnish.rewards.isolated:ISOLATED",
        "burnish.rewards.formats:FORMATS",
        "burnish.rewards.steps:STEPS",
    ),
    "combine": ("burnish.rewards.combine:COMBINE",),
    "segmenter": ("burnish.rewards.segments:SEGMENTERS",),
}
USER_ROW = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")
SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # numbers to everyone but YAML 1.1
ARXIV = re.compile(r"arXiv:\d{4}\.\d{4,5}")


class UnknownName(ConfigError, KeyError):
    """A name that is no row of its table."""

    __str__ = BurnishError.render  # KeyError would show the repr


@dataclass(frozen=True)
class About:
    """What is known of a row besides its code: taxonomy identifiers, paper (`arXiv:2203.11171`), year.

    `bias` says of an estimator how its expectation differs from what it estimates: "none", or what is off.
    `package` is an optional package the row cannot do without, `extra` the extra of ours that installs it.
    """

    taxonomy: tuple[str, ...] = ()
    paper: str | None = None
    year: int | None = None
    bias: str | None = None
    package: str | None = None
    extra: str | None = None


@dataclass(frozen=True)
class RowDescription:
    """A row as its source shows it. `facts` are the literal keywords of a row that is an object, not a function.

    A row that is a keyword-only dataclass has its fields for parameters, what it sets for their defaults.
    `parameters` are the settings (keyword-only); `inputs` what a function is handed besides them.
    """

    kind: str
    name: str
    parameters: tuple[Parameter, ...]
    doc: str
    path: Path
    line: int
    sha256: str
    about: About = About()
    also: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    inputs: Inputs = field(default_factory=Inputs)

    @property
    def summary(self) -> str:
        return self.doc.strip().split("\n", 1)[0]

    @property
    def citation(self) -> str | None:
        """The paper, from the metadata or else the docstring."""
        found = ARXIV.search(self.doc)
        return self.about.paper or (found[0] if found else None)

    @property
    def takes(self) -> str:
        return f"It takes {', '.join(map(str, self.parameters))}." if self.parameters else "It takes no parameters."


class Table(Mapping[str, Any]):
    """Rows by name. `also` maps a name used elsewhere to ours, for did-you-mean; it is never accepted as a name."""

    def __init__(
        self, kind: str, rows: Mapping[str, Any], *, also: Mapping[str, str] = {}, about: Mapping[str, About] = {}
    ) -> None:
        self.kind, self.rows, self.also, self.about = kind, dict(rows), dict(also), dict(about)
        if stray := (set(self.also.values()) | set(self.about)) - set(self.rows):
            raise ValueError(f"table {kind!r}: `also` or `about` speak of rows it has not: {sorted(stray)}")

    def __getitem__(self, name: str) -> Any:
        if name not in self.rows:
            raise unknown_name(self.kind, name, self.rows, self.also)
        return self.rows[name]

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that was probably meant, whatever its case and hyphens."""
    by_folded = {c.lower().replace("-", "_"): c for c in candidates}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), by_folded, n=1, cutoff=0.6)
    return by_folded[near[0]] if near else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest candidate, or nothing."""
    near = nearest(word, candidates)
    return f" Did you mean {near!r}?" if near else ""


def unknown_name(kind: str, name: str, rows: Iterable[str], also: Mapping[str, str]) -> UnknownName:
    """The error for a name that is no row: what was meant, and the rows there are."""
    rows = list(rows)
    near = nearest(name, [*rows, *also])
    hint = f" Did you mean {also.get(near, near)!r}?" if near else ""
    return UnknownName(f"{name!r} is not a {kind}.{hint} There are: {', '.join(rows)}; or your own file.py:function")


def _describe(
    kind: str, name: str, source: Source, node: ast.expr, about: About = About(), also: tuple[str, ...] = ()
) -> RowDescription:
    home, found = find(source, node)
    parameters: tuple[Parameter, ...] = ()
    facts: dict[str, Any] = {}
    inputs, doc = Inputs(), home.doc
    if isinstance(found, ast.FunctionDef):
        parameters, inputs, doc = parameters_of(home, found), inputs_of(found), ast.get_docstring(found) or ""
    elif isinstance(found, ast.Call):
        parameters, doc = fields_of(home, found) or (), home.notes.get(found, home.doc)
        facts = {k.arg: literal(k.value) for k in found.keywords if k.arg and literal(k.value) is not ...}
    return RowDescription(kind, name, parameters, doc, home.path, found.lineno, home.sha256, about, also, facts, inputs)


def _table(location: str) -> tuple[Source, ast.Dict, dict[str, str], dict[str, About]]:
    """The `NAME = Table("kind", {...})` literal at `module:NAME`: its rows as nodes, its aliases and metadata."""
    module, name = location.split(":")
    source, found = find(read_module(module), ast.Name(name))
    match found:
        case ast.Call(func=ast.Name(id="Table"), args=[ast.Constant(), ast.Dict() as rows], keywords=keywords):
            given = {k.arg: k.value for k in keywords}
        case _:
            remedy = 'write NAME = Table("kind", {"row": function})'
            raise unreadable(source, found, f"{name} is not a Table literal", remedy)
    also: dict[str, str] = ast.literal_eval(given["also"]) if "also" in given else {}
    about: dict[str, About] = {}
    match given.get("about"):
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Call):
                    about[str(key.value)] = About(**{k.arg: ast.literal_eval(k.value) for k in value.keywords if k.arg})
        case _:
            pass
    return source, rows, also, about


def describe(kind: str) -> dict[str, RowDescription]:
    """Every row of a kind of table, read from source. Raises ConfigError for an unknown kind or unreadable row."""
    if kind not in TABLES:
        raise unknown_name("kind of table", kind, TABLES, {})
    found: dict[str, RowDescription] = {}
    for location in TABLES[kind]:
        source, rows, also, about = _table(location)
        for key, value in zip(rows.keys, rows.values, strict=True):
            name = str(ast.literal_eval(key)) if key else ""
            aliases = tuple(alias for alias, target in also.items() if target == name)
            found[name] = _describe(kind, name, source, value, about.get(name, About()), aliases)
    return found


def describe_row(kind: str, name: str) -> RowDescription:
    """One row, or the user's own `file.py:function`. Raises ConfigError with did-you-mean when there is none."""
    if user := USER_ROW.fullmatch(name):
        path = Path(user["file"])
        if not path.is_file():
            raise ConfigError(f"{user['file']!r} does not exist, seen from {Path.cwd()}")
        source = read_source(path)
        if user["function"] not in {*source.functions, *source.values}:
            if re.search(rf"^async def {user['function']}\b", path.read_text(encoding="utf-8"), re.MULTILINE):
                remedy = "write a plain function; it may call asyncio.run(...)"
                raise ConfigError(f"{path}: {user['function']!r} is async", remedy=remedy)
            raise ConfigError(f"{path} has no {user['function']!r}.{did_you_mean(user['function'], source.functions)}")
        return _describe(kind, name, source, ast.Name(user["function"]))
    rows = describe(kind)
    if name not in rows:
        raise unknown_name(kind, name, rows, {alias: row.name for row in rows.values() for alias in row.also})
    return rows[name]


def read_number(value: Any) -> Any:
    """`1e-5` is text to YAML 1.1: read it, and lists of it, as the number it was meant to be."""
    if isinstance(value, list):
        return [read_number(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, str) and SCIENTIFIC.fullmatch(value):
        number = float(value)
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    return value


def shown(value: Any) -> str:
    """A value as a recipe would write it, cut at 80 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def faults_in(row: RowDescription, params: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(validated values with defaults filled in, [(parameter, what is wrong)])."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # here: what trains and samples runs without it

    finite = ConfigDict(allow_inf_nan=False)
    values: dict[str, Any] = {}
    faults: list[tuple[str, str]] = []
    names = [p.name for p in row.parameters]
    for name in params:
        if name not in names:
            faults.append((name, f"{row.name!r} has no parameter {name!r}.{did_you_mean(name, names)} {row.takes}"))
    for parameter in row.parameters:
        name = parameter.name
        if name not in params:
            values[name] = parameter.default
            if parameter.required:
                choices = f"one of {', '.join(describe(name))}" if name in TABLES else wanted(parameter.type)
                faults.append((name, f"{row.name!r} needs {name!r}: {choices}"))
            continue
        for value in (params[name], read_number(params[name])):
            try:
                values[name] = TypeAdapter(parameter.type, config=finite).validate_json(json.dumps(value), strict=True)
                break
            except ValidationError:
                continue
        else:
            faults.append((name, f"{shown(params[name])} given, wanted {wanted(parameter.type)}"))
            continue
        if name in TABLES:  # named after a kind of table: the name of one of its rows, or of several
            several: Any = values[name] if isinstance(values[name], (list, tuple)) else [values[name]]
            for chosen in filter(lambda value: isinstance(value, str), several):
                try:
                    describe_row(name, chosen)
                except ConfigError as error:
                    faults.append((name, error.message))
    return values, faults


def bind(row: RowDescription, params: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
    """The keyword arguments of a row, validated, defaults filled in. Raises ConfigError that names every fault."""
    values, faults = faults_in(row, params)
    if faults:
        raise ConfigError("\n".join(f"{row.kind}.{name}: {message}" for name, message in faults), where=where)
    return values


def differences(one: RowDescription, other: RowDescription) -> dict[str, tuple[Any, Any]]:
    """Parameter -> (default of one, default of the other), where they differ; ... where a row has no such parameter."""
    mine, theirs = ({p.name: p.default for p in row.parameters} for row in (one, other))
    pairs = {name: (mine.get(name, ...), theirs.get(name, ...)) for name in {**mine, **theirs}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def load_table(kind: str) -> Table:
    """The live table: imports every module that holds rows of this kind."""
    tables: list[Table] = []
    for location in TABLES[kind]:
        module, name = location.split(":")
        tables.append(getattr(importlib.import_module(module), name))
    merged = {name: row for table in tables for name, row in table.items()}
    also = {alias: name for table in tables for alias, name in table.also.items()}
    return Table(kind, merged, also=also)


def load_row(kind: str, name: str) -> Callable[..., Any]:
    """The live function of a row. A user's `file.py:function` is executed here and nowhere else."""
    row = describe_row(kind, name)
    user = USER_ROW.fullmatch(name)
    if not user:
        return load_table(kind)[name]
    spec = importlib.util.spec_from_file_location(f"burnish_user_{row.sha256[:16]}", row.path)
    assert spec and spec.loader
    if spec.name not in sys.modules:
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[spec.name]
            raise ConfigError(f"raised {error!r} when it was loaded", where=str(row.path)) from error
    return getattr(sys.modules[spec.name], user["function"])
