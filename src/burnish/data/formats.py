"""Rows to examples: the shape of a dataset is recognised from its columns, and every refusal says what was found.

Recognised, in this order: preference, stepwise and unpaired rows (other methods learn from those), `messages`,
ShareGPT `conversations`, `prompt` + `completion` (text or message lists), alpaca `instruction` + `output`, `text`,
`prompt` alone. A `columns` mapping such as {prompt: question, completion: answer} says which column plays which part;
then only formats that have all mapped parts are considered, those supervised tuning can use first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Example, Message, Role
from burnish.core.runs import file_sha256
from burnish.core.table import did_you_mean
from burnish.data.sources import BadRow, Dropped, Located, OnBadRow, nothing_left, read_rows

Need = Literal["completion", "prompt"]
Turns = tuple[Message, ...]

ROLES: dict[str, Role] = {role: role for role in get_args(Role)}
SPEAKERS: dict[str, Role] = {  # ShareGPT's `from`
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
FLAGS = ("train", "training", "loss", "weight")  # spellings of "learn this turn or not" met in published data
UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning", "images", "audio")
GUESSES = {  # columns people use for the parts, for the remedy only
    "prompt": ("question", "query", "input", "problem", "instruction", "user"),
    "completion": ("answer", "response", "output", "target", "solution", "assistant", "rationale"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "text": ("content", "document", "body"),
}


@dataclass(frozen=True)
class Format:
    """A row shape: the columns that must be there, those that may, and who learns from it if supervised tuning cannot.

    roles: True where rows carry roles (a conversation), False for plain strings, None where either is met.
    """

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    roles: bool | None = None
    instead: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        return self.needs + self.may

    def fits(self, parts: Mapping[str, Any]) -> bool:
        if self.name == "unpaired" and not isinstance(parts.get("label"), bool):
            return False
        return all(parts.get(column) is not None for column in self.needs)


FORMATS = (
    Format(
        "preference",
        ("chosen", "rejected"),
        ("prompt",),
        instead="a preference method (dpo) learns from these; to imitate the chosen answers alone, say columns: "
        "{prompt: prompt, completion: chosen}, or columns: {messages: chosen} where they are whole conversations",
    ),
    Format(
        "stepwise",
        ("prompt", "completions", "labels"),
        instead="a process reward model (prm) learns from these; supervised tuning needs one completion a row",
    ),
    Format(
        "unpaired",
        ("prompt", "completion", "label"),
        instead="a method for unpaired feedback (kto) learns from these; to imitate the good answers alone, keep the "
        "rows whose label is true and say columns: {prompt: prompt, completion: completion}",
    ),
    Format("messages", ("messages",), roles=True),
    Format("sharegpt", ("conversations",), ("system",), roles=True),
    Format("prompt_completion", ("prompt", "completion")),
    Format("alpaca", ("instruction", "output"), ("input", "system", "history"), roles=True),
    Format("text", ("text",), roles=False),
    Format("prompt", ("prompt",)),
)
COLUMNS = tuple(dict.fromkeys(column for form in FORMATS for column in form.columns))


@dataclass(frozen=True)
class Dataset:
    """A file as understood. `conversational` is False for plain strings, which need no chat template.

    rows counts every row read, kept or dropped; sha256 is of the file's bytes; notices count what was not used.
    """

    path: Path
    examples: tuple[Example, ...]
    format: str
    conversational: bool
    rows: int
    dropped: Dropped
    notices: Mapping[str, int]
    sha256: str


def load(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    need: Need = "completion",
    on_bad_row: OnBadRow = "error",
    limit: int | None = None,
) -> Dataset:
    """Read and understand a file; with `limit`, no further than that many examples.

    Raises DataError for the first bad row (`on_bad_row="skip"`: only when no row is left), ConfigError for `columns`.
    """
    path, dropped, parser = Path(path), Dropped(), Parser(columns=columns, need=need)
    examples: list[Example] = []
    for located in read_rows(path, on_bad_row=on_bad_row, dropped=dropped):
        try:
            examples.append(parser(located))
        except BadRow as bad:
            if on_bad_row == "error":
                raise
            dropped.add(bad.reason, located.where)
        if limit is not None and len(examples) >= limit:
            break
    if not examples or parser.format is None:
        raise nothing_left(str(path), dropped)
    return Dataset(
        path=path,
        examples=tuple(examples),
        format=parser.format.name,
        conversational=parser.conversational,
        rows=len(examples) + dropped.total,
        dropped=dropped,
        notices=dict(parser.notices),
        sha256=file_sha256(path),
    )


@dataclass
class Parser:
    """Turns located rows into examples. The first row understood fixes the format; a row of another is a bad row.

    need="completion" for methods that imitate, "prompt" for methods that only want something to answer.
    """

    columns: Mapping[str, str] | None = None
    need: Need = "completion"
    format: Format | None = field(default=None, init=False)
    conversational: bool = field(default=False, init=False)
    notices: dict[str, int] = field(default_factory=dict[str, int], init=False)

    def __post_init__(self) -> None:
        self.columns = dict(self.columns or {})
        for part, column in self.columns.items():
            if part not in COLUMNS:
                hint = f"{did_you_mean(part, COLUMNS)} There are: {', '.join(COLUMNS)}"
                raise ConfigError(f"{part!r} is no part of a row.{hint}", where="columns")
            if sum(column == other for other in self.columns.values()) > 1:
                raise ConfigError(f"the column {column!r} is given two parts", where=f"columns.{part}")
        order = sorted(FORMATS, key=lambda form: bool(form.instead)) if self.columns else FORMATS
        self._mappable = tuple(form for form in order if set(self.columns) <= set(form.columns))
        if not self._mappable:
            message = f"no format has all of {', '.join(self.columns)} at once"
            raise ConfigError(message, where="columns", remedy=f"formats: {_catalogue(FORMATS)}")

    def __call__(self, located: Located) -> Example:
        """Raises BadRow for this row, DataError where the whole file has the wrong kind of rows."""
        row, where = located.row, located.where
        parts = self._parts(row, where)
        form, conversational = self._recognise(row, parts, where)
        self._admit(form, conversational, where)
        mapped = {cast(dict[str, str], self.columns).get(part, part) for part in form.columns}
        extra = {column: value for column, value in row.items() if column not in mapped}
        if conversational and extra.get("tools"):
            message = "tool definitions cannot be shown to the model yet"
            remedy = "rename the column to keep it as plain data"
            raise BadRow("tools", message, where=f"{where}  tools", remedy=remedy)
        prompt, completion, text = self._read(form, parts, where)
        return Example(prompt=prompt, completion=completion, text=text, columns=extra, where=where)

    def _parts(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        mapping = cast(dict[str, str], self.columns)
        for part, column in mapping.items():
            if row.get(column) is None:
                state = "is null" if column in row else "is missing"
                message = f"the column {column!r}, mapped to {part!r}, {state}; found: {', '.join(row) or 'none'}"
                raise BadRow("missing column", message + did_you_mean(column, row), where=where)
        taken = set(mapping.values())
        natural = {part: row[part] for part in COLUMNS if part in row and part not in taken}
        return natural | {part: row[column] for part, column in mapping.items()}

    def _recognise(self, row: Mapping[str, Any], parts: Mapping[str, Any], where: str) -> tuple[Format, bool]:
        form = next((form for form in self._mappable if form.fits(parts)), None)
        if form is None:
            nulls = [column for column, value in row.items() if value is None]
            found = (", ".join(row) or "none") + (f" (null: {', '.join(nulls)})" if nulls else "")
            message = f"columns found: {found}; accepted: {_catalogue(self._mappable)}"
            if self.format is not None:
                message = f"the rows before are {self.format.name}, this one is not. {message}"
            raise BadRow("unknown columns", message, where=where, remedy=_guess(row))
        if form.roles is not None:
            return form, form.roles
        return form, any(isinstance(parts.get(part), list) for part in form.needs)

    def _admit(self, form: Format, conversational: bool, where: str) -> None:
        if self.format is None:
            if form.instead:
                found = f"these rows are in {form.name} format ({', '.join(form.needs)})"
                message = f"{found}, which supervised tuning cannot learn from"
                raise DataError(message, where=where, remedy=form.instead)
            if self.need == "completion" and form.name == "prompt":
                remedy = "add a completion column, or map one: columns: {prompt: prompt, completion: answer}"
                raise DataError("these rows have a prompt and nothing to learn after it", where=where, remedy=remedy)
            if self.need == "prompt" and form.name == "text":
                message = "these rows are plain text; prompts are needed"
                raise DataError(message, where=where, remedy="map a column: columns: {prompt: text}")
            self.format, self.conversational = form, conversational
        elif (form, conversational) != (self.format, self.conversational):
            before, now = _title(self.format, self.conversational), _title(form, conversational)
            message = f"this row is {now}; the rows before are {before}"
            raise BadRow("another format", message, where=where, remedy="split the file: one format each")

    def _read(self, form: Format, parts: Mapping[str, Any], where: str) -> tuple[Turns, Turns, str | None]:
        match form.name:
            case "text":
                return (), (), _text(parts["text"], "text", where)
            case "messages":
                turns = self._messages(parts["messages"], where, "messages")
            case "sharegpt":
                turns = self._messages(parts["conversations"], where, "conversations", "from", "value", SPEAKERS)
                if parts.get("system"):
                    turns = (Message("system", _text(parts["system"], "system", where)), *turns)
            case "alpaca":
                turns = _alpaca(parts, where)
            case _ if self.conversational:
                prompt = self._messages(parts["prompt"], where, "prompt")
                if form.name == "prompt":
                    completion = ()
                else:
                    completion = self._messages(parts["completion"], where, "completion")
                _check_order((*prompt, *completion), where, form.name)
                if prompt[-1].role == "assistant":
                    message = "a prompt ends with the turn to be answered, not with the assistant's"
                    raise BadRow("wrong role order", message, where=f"{where}  prompt")
                if completion and completion[-1].role != "assistant":
                    message = f"a completion ends with an assistant turn; this one is {_roles(completion)}"
                    raise BadRow("wrong role order", message, where=f"{where}  completion")
                return prompt, completion, None
            case _:
                prompt = (Message("user", _text(parts["prompt"], "prompt", where)),)
                if "completion" not in form.needs:
                    return prompt, (), None
                return prompt, (Message("assistant", _text(parts["completion"], "completion", where)),), None
        _check_order(turns, where, form.name)
        if turns[-1].role == "assistant":
            return turns[:-1], turns[-1:], None
        if self.need == "completion":
            message = f"the conversation ends with a {turns[-1].role} turn: nothing answers it"
            raise BadRow("no completion", message, where=where, remedy="drop the turns after the last assistant turn")
        return turns, (), None

    def _messages(
        self,
        value: Any,
        where: str,
        column: str,
        role_key: str = "role",
        content_key: str = "content",
        roles: Mapping[str, Role] = ROLES,
    ) -> Turns:
        if not isinstance(value, list):
            message = f"must be a list of messages, this is {_kind(value)}"
            raise BadRow("wrong type", message, where=f"{where}  {column}")
        if not value:
            raise BadRow("empty messages", "holds no message", where=f"{where}  {column}")
        turns: list[Message] = []
        for index, message in enumerate(value):
            at = f"{where}  {column}[{index}]"
            if not isinstance(message, dict):
                raise BadRow("wrong type", f"a message must be an object, this is {_kind(message)}", where=at)
            if missing := [key for key in (role_key, content_key) if message.get(key) is None]:
                found = f"found: {', '.join(message) or 'none'}"
                raise BadRow("incomplete message", f"{' and '.join(missing)} missing or null; {found}", where=at)
            name = message[role_key]
            if not isinstance(name, str) or name not in roles:
                hint = did_you_mean(name, roles) if isinstance(name, str) else ""
                known = f"{hint} There are: {', '.join(roles)}"
                raise BadRow("unknown role", f"{name!r} is no role.{known}", where=f"{at}.{role_key}")
            train = self._flag(message, at)
            for key in message.keys() - {role_key, content_key, *FLAGS}:
                self._unused(key, message[key], at)
            role = roles[name]
            content = _content(message[content_key], f"{at}.{content_key}")
            if not content.strip() and role in ("user", "assistant"):
                kind = f"the {role} turn is empty or only whitespace"
                raise BadRow("empty content", kind, where=f"{at}.{content_key}")
            turns.append(Message(role, content, train))
        return tuple(turns)

    def _flag(self, message: Mapping[str, Any], at: str) -> bool | None:
        given = {key: message[key] for key in FLAGS if message.get(key) is not None}
        for key, value in given.items():
            if value not in (0, 1):  # True and False included
                raise BadRow("wrong type", f"must be true or false, this is {value!r}", where=f"{at}.{key}")
        meant = {bool(value) for value in given.values()}
        if len(meant) > 1:
            raise BadRow("wrong type", f"{' and '.join(given)} contradict each other", where=at)
        return meant.pop() if meant else None

    def _unused(self, key: str, value: Any, at: str) -> None:
        if value is None or value == [] or value == "":
            return
        if key in UNSUPPORTED:
            text = f"{key!r} cannot be shown to the model yet"
            remedy = "write it into the content, or remove the key"
            raise BadRow("unsupported message key", text, where=f"{at}.{key}", remedy=remedy)
        notice = f"message key {key!r} is not used"
        self.notices[notice] = self.notices.get(notice, 0) + 1


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _alpaca(parts: Mapping[str, Any], where: str) -> Turns:
    turns: list[Message] = []
    if parts.get("system"):
        turns.append(Message("system", _text(parts["system"], "system", where)))
    history = parts.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs:
        raise BadRow("wrong type", "must be a list of [user, assistant] pairs", where=f"{where}  history")
    for index, (asked, answered) in enumerate(history):
        turns.append(Message("user", _text(asked, f"history[{index}][0]", where)))
        turns.append(Message("assistant", _text(answered, f"history[{index}][1]", where)))
    asked = _text(parts["instruction"], "instruction", where)
    if parts.get("input"):
        asked = f"{asked}\n{_text(parts['input'], 'input', where)}"
    return (*turns, Message("user", asked), Message("assistant", _text(parts["output"], "output", where)))


def _check_order(turns: Sequence[Message], where: str, name: str) -> None:
    """system? (user (assistant tool*)*)*: each role only after those it can answer."""
    follows = {"user": ("start", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
    before = "start"
    for index, turn in enumerate(turns):
        if turn.role == "system":
            if index:
                raise BadRow("wrong role order", f"turn {index} is a system turn; only the first may be", where=where)
            continue
        if before not in follows[turn.role]:
            allowed = " or ".join("the beginning" if role == "start" else role for role in follows[turn.role])
            found = "begins" if before == "start" else f"follows {before}"
            message = f"turn {index} ({turn.role}) {found}; in {name} rows a {turn.role} turn comes after {allowed}"
            raise BadRow("wrong role order", f"{message}. Found: {_roles(turns)}", where=where)
        before = turn.role
    if before == "start":
        raise BadRow("empty messages", "holds only a system turn", where=where)


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"must be text, this is {_kind(value)}", where=f"{where}  {column}")
    if not value.strip():
        raise BadRow(f"empty {column.split('[')[0]}", "is empty or only whitespace", where=f"{where}  {column}")
    return value


def _content(value: Any, at: str) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"must be text or a list of text parts, this is {_kind(value)}", where=at)
    return value


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")


def _roles(turns: Sequence[Message]) -> str:
    return ", ".join(turn.role for turn in turns)


def _title(form: Format, conversational: bool) -> str:
    return f"{form.name} (message lists)" if conversational and form.roles is None else form.name


def _catalogue(forms: Sequence[Format]) -> str:
    return "; ".join(f"{' + '.join(form.needs)} ({form.name})" for form in forms if not form.instead)


def _guess(row: Mapping[str, Any]) -> str:
    """The `columns:` line that would probably mend it."""
    found = {part: next((c for c in row if c.lower() in names), None) for part, names in GUESSES.items()}
    for parts in (("prompt", "completion"), ("messages",), ("text",), ("prompt",)):
        named = {part: part if part in row else found[part] for part in parts}
        if all(named.values()):
            mapping = ", ".join(f"{part}: {column}" for part, column in named.items())
            return f"say which is which: columns: {{{mapping}}}"
    return "say which is which: columns: {prompt: <your column>, completion: <your column>}"
