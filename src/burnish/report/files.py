"""What the files of a run folder may say, read with suspicion: a file that is missing or damaged costs its own part of the
report and is named in it, never the rest, and never a traceback.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

LARGEST = 64_000_000  # bytes of one JSON file; nothing burnish writes comes near it
SCHEMA = 1
_SURROGATE = re.compile("[\ud800-\udfff]")


def _spelled(value: Any) -> Any:
    """Answers and ids may be numbers in files written by others."""
    if isinstance(value, bool) or value is None:
        return value
    return f"{value}" if isinstance(value, int | float) else value


Text = Annotated[str, BeforeValidator(_spelled)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Share = Annotated[float, Field(ge=0, le=1)]
Whole = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


class _File(BaseModel):
    """Keys we do not know are left alone: a later burnish may write more."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)


class PrimaryMetric(_File):
    eval: Name
    strategy: Name = "greedy"


class RunFile(_File):
    """run.json"""

    burnish: str | None = None
    name: Name | None = None
    about: str | None = None
    recipe: str | None = None
    model: str | None = None
    seed: int | None = None
    status: str | None = None
    primary: PrimaryMetric | None = None
    started: str | None = None
    finished: str | None = None
    starts: Whole | None = None
    resolved: dict[str, Any] | None = None


class MaskRow(_File):
    where: Text = ""
    tokens: list[tuple[str, bool]] = []


class DataSummary(_File):
    rows: Whole | None = None
    validation_rows: Whole | None = None
    dropped: dict[str, Whole] = {}
    notices: dict[str, Any] = {}
    tokens: Whole | None = None
    label_tokens: Whole | None = None
    longest: Whole | None = None
    format: str | None = None
    sources: list[dict[str, Any]] = []


class StageFile(_File):
    """stage.json"""

    method: Name | None = None
    status: str | None = None
    steps: Whole | None = None
    skipped_steps: Whole | None = None
    stopped_by: str | None = None
    input: str | None = None
    output: str | None = None
    data: DataSummary | None = None
    mask_view: list[MaskRow] = []


class Measured(_File):
    seconds: dict[str, Amount] = {}
    peak_memory_bytes: Whole | None = None
    joules: Amount | None = None
    money: Amount | None = None


class LedgerFile(_File):
    """ledger.json"""

    counted: dict[str, dict[str, Whole]]
    measured: Measured = Measured()


class SpendRow(_File):
    prefill_tokens: Whole | None = None
    sampled_tokens: Whole | None = None
    scored_tokens: Whole | None = None
    useful_flops: Whole | None = None
    executed_flops: Whole | None = None


class StrategyRow(_File):
    strategy: Name
    oracle: bool = False
    accuracy: Share | None = None
    correct: list[Share]
    spend: SpendRow = SpendRow()
    completions: Whole | None = None
    truncated: Whole | None = None
    unanswered: Whole | None = None


class Completion(_File):
    strategy: Name
    text: Text | None = None
    answer: Text | None = None
    correct: bool | None = None


class SampleRow(_File):
    id: Text
    prompt: Text = ""
    gold: Text | None = None
    level: Text | None = None
    completions: list[Completion] = []


class EvalFile(_File):
    """evals/<eval>.json"""

    eval: Name
    task: str | None = None
    fold: str | None = None
    n: Whole
    settings: dict[str, Any] = {}
    item_ids: list[Text] = []
    strategies: list[StrategyRow]
    samples: list[SampleRow] = []
    seconds: Amount | None = None


class MetricsRow(_File):
    """A line of metrics.jsonl; what a method logs besides is kept as it is."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), allow_inf_nan=False)

    step: Whole
    kind: Literal["train", "validation"]
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None


class TimingRow(_File):
    """A line of timing.jsonl; kind `resume` marks the step after which a resumed run went on."""

    step: Whole
    kind: str | None = None
    train_tokens_per_s: Amount | None = None


class RoundLine(_File):
    """A line of a round's trajectories: the first says what was asked, the others hold a completion each."""

    questions: list[Any] | None = None
    group: Whole | None = None
    tokens: list[int] = []
    finish: Text = ""
    text: Text = ""
    rewards: dict[str, float | None] = {}
    total: float | None = None


class CreditLine(_File):
    """A line of what training made of a round: a group with its prompt, and the advantage of each completion."""

    group: Whole | None = None
    where: Text | None = None
    prompt: str | list[dict[str, Any]] | None = None
    answer: Any = None
    advantages: list[float | None] = []
    live: list[bool] = []


class DecisionRow(_File):
    value: Any = None
    why: str | None = None
    measured: dict[str, Any] | None = None


F = TypeVar("F", bound=BaseModel)


@dataclass
class Reading:
    """Reads the files of one run and remembers what was wrong with them, in words."""

    root: Path
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def _called(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def _is_file(self, path: Path, *, expected: bool) -> bool:
        if not path.is_symlink() and path.is_file():
            return True
        if expected or path.exists() or path.is_symlink():
            kind = "is a link or a folder, not a file" if path.exists() or path.is_symlink() else None
            (self.damaged if kind else self.missing).append(self._called(path) + (f" {kind}" if kind else ""))
        return False

    def _bytes(self, path: Path, *, expected: bool) -> bytes | None:
        try:
            if not self._is_file(path, expected=expected):
                return None
            if path.stat().st_size > LARGEST:
                self.damaged.append(f"{self._called(path)} has {path.stat().st_size:,} bytes, more than any file of a run")
                return None
            return path.read_bytes()
        except OSError as error:
            self.damaged.append(f"{self._called(path)} cannot be read: {error.strerror or error}")
            return None

    def text(self, path: Path, *, expected: bool = True) -> str | None:
        raw = self._bytes(path, expected=expected)
        return None if raw is None else raw.decode("utf-8", errors="replace")

    def json(self, path: Path, *, expected: bool = True) -> Any:
        """Plain data, or None. Numbers that are not finite become None, halves of surrogate pairs a replacement character."""
        raw = self._bytes(path, expected=expected)
        if raw is None:
            return None
        try:
            return parse_json(raw)
        except ValueError as error:
            self.damaged.append(f"{self._called(path)} is not JSON: {error}")
            return None

    def file(self, path: Path, kind: type[F], *, expected: bool = True) -> F | None:
        """The file as `kind`, or None when it is missing, damaged, or written by a newer burnish."""
        data = self.json(path, expected=expected)
        if data is None:
            return None
        if isinstance(data, dict) and isinstance(data.get("schema"), int) and data["schema"] > SCHEMA:
            self.damaged.append(f"{self._called(path)} was written by a newer burnish (schema {data['schema']}, this one reads {SCHEMA})")
            return None
        return self.typed(data, kind, self._called(path))

    def typed(self, data: Any, kind: type[F], where: str) -> F | None:
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            key = ".".join(map(str, first["loc"]))
            given = repr(first["input"])
            short = given if len(given) <= 40 else given[:37] + "..."
            self.damaged.append(f"{where}: {key[:100] + ': ' if key else ''}{first['msg'].lower()}, got {short}")
            return None

    def lines(self, path: Path, kind: type[F], *, expected: bool = True) -> list[F]:
        """The whole lines of a .jsonl; one torn at the end is the mark of a killed process and is left out in silence."""
        raw = self._bytes(path, expected=expected)
        rows, bad = [], 0
        for line in (raw or b"").splitlines(keepends=True):
            if not line.endswith(b"\n") or not line.strip():
                continue
            try:
                rows.append(kind.model_validate(parse_json(line)))
            except ValueError:  # ValidationError is one
                bad += 1
        if bad:
            self.damaged.append(f"{self._called(path)} has {bad} damaged line{'' if bad == 1 else 's'}; the others are used")
        return rows


    def packed(self, path: Path, kind: type[F], enough: Callable[[F], bool]) -> list[F]:
        """The lines of a .jsonl.gz up to the first that is `enough`. The file is whole or absent, so a bad line is damage."""
        rows: list[F] = []
        try:
            if not self._is_file(path, expected=True):
                return []
            with gzip.open(path) as lines:
                while line := lines.readline(LARGEST):
                    row = kind.model_validate(parse_json(line))
                    if enough(row):
                        break
                    rows.append(row)
        except (OSError, EOFError, zlib.error, ValueError) as error:
            why = "a line of it is not what it should be" if isinstance(error, ValueError) else str(error)
            self.damaged.append(f"{self._called(path)} cannot be read: {why}")
            return []
        return rows


def parse_json(raw: bytes) -> Any:
    """JSON with only finite numbers and whole characters. Raises ValueError, also where it is nested too deeply."""
    try:
        text = raw.decode("utf-8", errors="replace")
        return _clean(json.loads(text, parse_constant=lambda _: None))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _clean(value: Any) -> Any:
    match value:
        case str():
            return _SURROGATE.sub("\ufffd", value)
        case bool() | None:
            return value
        case int():
            return value if abs(value) < 10**30 else None
        case float():
            return value if math.isfinite(value) else None
        case list():
            return [_clean(each) for each in value]
        case dict():
            return {_SURROGATE.sub("\ufffd", key): _clean(each) for key, each in value.items()}
    return None
