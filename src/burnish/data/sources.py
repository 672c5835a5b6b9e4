"""Files to rows: strict, streaming, and every refusal says file, line and column.

Accepted: `.jsonl` and `.ndjson` (one object a line), `.json` (a list of objects, or one object a line), `.csv` (a
header, then text cells). Everything is UTF-8, with or without a byte order mark, with Unix or Windows line ends.
Nothing is repaired: a byte that is not UTF-8 is an error, never a replacement character.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from burnish.core.errors import DataError

LINE_LIMIT = 32 * 2**20  # bytes of one JSONL line: what bounds memory, however large the file
JSON_LIMIT = 256 * 2**20  # bytes of a `.json` list, which is held whole
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
OnBadRow = Literal["error", "skip"]
_BOM = b"\xef\xbb\xbf"
_WIDE = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True)
class Located:
    """A row and where it stands: `file:line`."""

    row: dict[str, Any]
    where: str


class BadRow(DataError):
    """One row that cannot be used. `reason` is the short name it is counted under."""

    def __init__(self, reason: str, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.reason = reason
        super().__init__(message, where=where, remedy=remedy)


@dataclass
class Dropped:
    """Rows left out, by reason, and where each reason was first met. Blank lines hold no row and are counted apart."""

    counts: dict[str, int] = field(default_factory=dict[str, int])
    first: dict[str, str] = field(default_factory=dict[str, str])
    blank_lines: int = 0

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        """`8 too long (first: train.jsonl:14), 4 empty completion (first: train.jsonl:20)`, most frequent first."""
        by_count = sorted(self.counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{n} {reason} (first: {self.first[reason]})" for reason, n in by_count) or "none"


def nothing_left(where: str, dropped: Dropped) -> DataError:
    """The error for a source that leaves no row to work on, with the table of reasons."""
    if dropped.total:
        return DataError(f"no row is left; dropped: {dropped}", where=where, remedy="mend the rows or use other data")
    held = f"{dropped.blank_lines} blank lines and no row" if dropped.blank_lines else "no rows"
    return DataError(f"holds {held}", where=where, remedy="write one JSON object a line")


def read_rows(path: str | Path, *, on_bad_row: OnBadRow = "error", dropped: Dropped | None = None) -> Iterator[Located]:
    """Every row of a file, lazily, read by its suffix. Raises DataError as each reader says."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        remedies = {
            ".parquet": "convert: python -c \"import pandas; pandas.read_parquet('in.parquet').to_json('out.jsonl', "
            "orient='records', lines=True)\"",
            ".arrow": "convert: datasets.Dataset.from_file('in.arrow').to_json('out.jsonl')",
            ".gz": "unpack it first: gunzip --keep",
            ".zst": "unpack it first: zstd -d",
            ".txt": 'write each document as one line {"text": "..."} in a .jsonl file',
        }
        kind = suffix or "a file without a suffix"
        raise DataError(
            f"cannot read {kind}; accepted are {', '.join(SUFFIXES)}",
            where=str(path),
            remedy=remedies.get(suffix, "convert it to JSON Lines: one object a line, in a .jsonl file"),
        )
    readers = {".json": read_json, ".csv": read_csv}
    return readers.get(suffix, read_jsonl)(path, on_bad_row=on_bad_row, dropped=dropped)


def read_jsonl(
    path: str | Path,
    *,
    on_bad_row: OnBadRow = "error",
    dropped: Dropped | None = None,
    line_limit: int = LINE_LIMIT,
) -> Iterator[Located]:
    """One JSON object a line; blank lines are skipped and counted. At most `line_limit` bytes are held at a time.

    Raises DataError: a missing or empty file; bytes that are not UTF-8 (with their offset), UTF-16, NUL, lone
    surrogates; lines that are no JSON, no object, too long, or cut off at the end of the file; a key given twice; NaN
    and Infinity. `on_bad_row="skip"` counts such lines in `dropped` instead, and raises only when none is left.
    """
    path, dropped = Path(path), dropped if dropped is not None else Dropped()
    return _kept(path, _jsonl_rows(path, dropped, line_limit), on_bad_row, dropped)


def read_json(path: str | Path, *, on_bad_row: OnBadRow = "error", dropped: Dropped | None = None) -> Iterator[Located]:
    """A list of objects (held whole, so at most 256 MiB); a file that starts with `{` is read as JSON Lines.

    Raises DataError as `read_jsonl`. Broken syntax cannot be skipped: what follows it has no known beginning.
    """
    path, dropped = Path(path), dropped if dropped is not None else Dropped()
    with _open(path) as source:
        start = source.read(4096).removeprefix(_BOM).lstrip()
    if start.startswith(b"{"):
        return read_jsonl(path, on_bad_row=on_bad_row, dropped=dropped)
    return _kept(path, _json_rows(path), on_bad_row, dropped)


def read_csv(path: str | Path, *, on_bad_row: OnBadRow = "error", dropped: Dropped | None = None) -> Iterator[Located]:
    """A header of unique names, then rows of as many cells; every value is text. Cells hold at most 131,072 characters.

    Raises DataError as `read_jsonl`, and for a header that repeats or lacks a name and a row of another width. Only the
    last can be skipped: cells may span lines, so after broken text no row has a known beginning.
    """
    path, dropped = Path(path), dropped if dropped is not None else Dropped()
    return _kept(path, _csv_rows(path, dropped), on_bad_row, dropped)


# ---- rows, or the reason why not ------------------------------------------------------------------------------------


def _kept(path: Path, rows: Iterable[Located | BadRow], on_bad_row: OnBadRow, dropped: Dropped) -> Iterator[Located]:
    kept = 0
    for row in rows:
        if isinstance(row, Located):
            kept += 1
            yield row
        elif on_bad_row == "error":
            raise row
        else:
            dropped.add(row.reason, row.where or str(path))
    if not kept:
        raise nothing_left(str(path), dropped)


def _jsonl_rows(path: Path, dropped: Dropped, line_limit: int) -> Iterator[Located | BadRow]:
    for line in _lines(path, line_limit):
        if isinstance(line, BadRow):
            yield line
        elif not line.data.strip(b" \t\r\n"):
            dropped.blank_lines += 1
        else:
            yield _attempt(lambda line=line: Located(_object(_decoded(line), line), line.where))


def _json_rows(path: Path) -> Iterator[Located | BadRow]:
    with _open(path) as source:
        data = source.read(JSON_LIMIT + 1)
    if len(data) > JSON_LIMIT:
        message = f"a JSON list is held whole, and this one is over {JSON_LIMIT // 2**20} MiB"
        raise DataError(message, where=str(path), remedy="use JSON Lines")
    offset = len(_BOM) if data.startswith(_BOM) else 0
    whole = _Line(data[offset:], 1, offset, path, True)
    text = _decoded(whole)
    at = _skip_space(text, 0)
    if at == len(text):
        return
    if text[at] != "[":
        raise DataError("must hold a list of objects", where=f"{path}:1", remedy="wrap the rows in [ ]")
    at, line, counted, after_comma = _skip_space(text, at + 1), 1, 0, False
    while after_comma or text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = _DECODER.raw_decode(text, at)
        except _Refused as refused:
            raise refused.at(f"{path}:{line}") from None
        except (ValueError, RecursionError) as error:
            raise _bad_json(error, text, whole) from error
        yield _attempt(lambda value=value, line=line: Located(_checked(value, f"{path}:{line}"), f"{path}:{line}"))
        at = _skip_space(text, end)
        if after_comma := text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise _bad_json(json.JSONDecodeError("expected ',' or ']'", text, at), text, whole)
    if _skip_space(text, at + 1) != len(text):
        raise _bad_json(json.JSONDecodeError("extra data after the list", text, at + 1), text, whole)


def _csv_rows(path: Path, dropped: Dropped) -> Iterator[Located | BadRow]:
    def texts() -> Iterator[str]:
        for line in _lines(path, LINE_LIMIT):
            if isinstance(line, BadRow):
                raise line  # a row may span lines, so a line that cannot be read has no known row to skip
            yield _decoded(line)

    reader = csv.reader(texts(), strict=True)
    header: list[str] | None = None
    begin = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            too_long = "limit" in str(error)
            remedy = "use JSON Lines for long texts" if too_long else 'quote cells with " and double it inside'
            raise BadRow("invalid CSV", f"invalid CSV: {error}", where=f"{path}:{begin}", remedy=remedy) from error
        where, begin = f"{path}:{begin}", reader.line_num + 1
        if not cells:
            dropped.blank_lines += 1
        elif header is None:
            header = cells
            if "" in header or len(set(header)) < len(header):
                raise DataError(f"the header needs unique, non-empty names; found {header}", where=where)
        elif len(cells) != len(header):
            message = f"{len(cells)} cells under a header of {len(header)}: {', '.join(header)}"
            yield BadRow("wrong number of cells", message, where=where)
        else:
            yield Located(dict(zip(header, cells)), where)


def _attempt(make: Callable[[], Located]) -> Located | BadRow:
    try:
        return make()
    except BadRow as bad:
        return bad


# ---- bytes to lines -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    data: bytes
    number: int
    offset: int  # of its first byte in the file
    path: Path
    last: bool  # no line end after it: the file may be cut off here

    @property
    def where(self) -> str:
        return f"{self.path}:{self.number}"


def _open(path: Path) -> BufferedReader:
    try:
        source = open(path, "rb")  # noqa: SIM115  (every caller uses `with`)
    except IsADirectoryError:
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)[:8]
        remedy = f"name one file in it: {', '.join(inside)}" if inside else f"it holds no {', '.join(SUFFIXES)} file"
        raise DataError("is a folder, not a file of rows", where=str(path), remedy=remedy) from None
    except FileNotFoundError:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        remedy = f"did you mean {path.parent / near[0]}?" if near else f"looked from {Path.cwd()}"
        raise DataError("no such file", where=str(path), remedy=remedy) from None
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror}", where=str(path)) from error
    mark = source.peek(4)  # not read and seek: a pipe cannot go back
    for wide, name in _WIDE.items():
        if mark.startswith(wide):
            source.close()
            remedy = f"convert it: iconv -f {name} -t UTF-8 {path.name} > utf8-{path.name}"
            raise DataError(f"is {name}; rows must be UTF-8", where=f"{path}:1:1", remedy=remedy)
    return source


def _lines(path: Path, limit: int) -> Iterator[_Line | BadRow]:
    with _open(path) as source:
        offset = len(source.read(len(_BOM))) if source.peek(len(_BOM)).startswith(_BOM) else 0
        number = 0
        while data := source.readline(limit + 1):
            number += 1
            size = len(data)
            if size > limit:
                message = f"a line longer than {limit:,} bytes, which is the limit"
                yield BadRow("line too long", message, where=f"{path}:{number}:{limit + 1}", remedy="one row a line")
                while not data.endswith(b"\n") and (data := source.readline(limit)):
                    size += len(data)
            else:
                yield _Line(data, number, offset, path, not data.endswith(b"\n"))
            offset += size


def _decoded(line: _Line) -> str:
    try:
        text = line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = line.data[: error.start]
        column = len(before[before.rfind(10) + 1 :].decode("utf-8")) + 1
        where = f"{line.path}:{line.number + before.count(10)}:{column}"
        message = f"byte 0x{line.data[error.start]:02x} at offset {line.offset + error.start} is not UTF-8"
        raise BadRow("invalid UTF-8", message, where=where, remedy="convert it with iconv -t UTF-8") from None
    if (at := text.find("\0")) >= 0:
        wide = line.data[1::2].count(0) > len(line.data) // 4 or line.data[::2].count(0) > len(line.data) // 4
        offset = line.offset + len(text[:at].encode())
        where = f"{line.path}:{line.number + text.count(chr(10), 0, at)}:{at - text.rfind(chr(10), 0, at)}"
        remedy = "this looks like UTF-16: convert it with iconv -f UTF-16 -t UTF-8" if wide else "remove it"
        raise BadRow("NUL", f"a NUL byte at offset {offset}", where=where, remedy=remedy)
    return text


# ---- text to an object ----------------------------------------------------------------------------------------------


class _Refused(ValueError):
    """Raised inside the JSON decoder's hooks, which do not know where they are."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(message)

    def at(self, where: str) -> BadRow:
        return BadRow(self.reason, self.message, where=where)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused("duplicate key", f"the key {twice!r} is given twice")
    return found


def _constant(name: str) -> Any:
    raise _Refused("not a JSON number", f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _constant(text[:40])


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)


def _object(text: str, line: _Line) -> dict[str, Any]:
    try:
        value = _DECODER.decode(text)
    except _Refused as refused:
        raise refused.at(line.where) from None
    except (ValueError, RecursionError) as error:
        raise _bad_json(error, text, line) from error
    return _checked(value, line.where)


def _bad_json(error: Exception, text: str, line: _Line) -> BadRow:
    if isinstance(error, RecursionError):
        return BadRow("invalid JSON", "nested too deeply", where=line.where)
    if not isinstance(error, json.JSONDecodeError):
        return BadRow("invalid JSON", f"invalid JSON: {error}", where=line.where)
    where = f"{line.path}:{line.number + error.lineno - 1}:{error.colno}"
    rest = len(text.rstrip()) - error.pos
    if line.last and (rest <= 0 or error.msg.startswith("Unterminated")):
        message = f"the file ends in the middle of a row ({error.msg})"
        return BadRow("truncated", message, where=where, remedy="the file looks cut off: copy or write it again")
    near = text[max(0, error.pos - 20) : error.pos + 20].strip()
    return BadRow("invalid JSON", f"invalid JSON: {error.msg}, near {near!r}", where=where)


def _checked(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        message = f"a row must be an object, this is {kind}"
        raise BadRow("not an object", message, where=where, remedy='write {"column": value, ...}')
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        key, item = stack.pop()
        if isinstance(item, dict):
            for name, inner in item.items():
                stack += [(f"{key}.{name}" if key else name, inner), ("a key", name)]
        elif isinstance(item, list):
            stack += [(key, inner) for inner in item]
        elif isinstance(item, str) and not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
            remedy = "half of a character pair: write the row again from its source"
            raise BadRow("lone surrogate", f"{key!r} holds a lone surrogate", where=where, remedy=remedy)
        elif isinstance(item, str) and "\0" in item:
            raise BadRow("NUL", f"{key!r} holds a NUL character", where=where, remedy="remove it")
    return value


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
