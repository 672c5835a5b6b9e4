"""The only place where text becomes token ids. Ids made here are final: nothing re-tokenises them.

A conversation is rendered by the tokenizer's chat template in a sandbox that bounds its work, encoded once as a whole,
and character spans are mapped to tokens by the tokenizer's offsets. Three promises:
- what a row says cannot become control: a control token typed inside a message is encoded as ordinary text;
- labels are chosen by token position, never by token id: a padding token that equals the end token hides nothing;
- the token that ends an assistant turn is a label, and a template without one is refused: models must learn to stop.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, wraps
from itertools import pairwise
from typing import Any, Literal

import jinja2.ext
import jinja2.nodes as nodes
from jinja2 import pass_environment
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from burnish.core.errors import DataError
from burnish.core.records import Example, Message, Rendered
from burnish.data.sources import BadRow, Dropped, OnBadRow, nothing_left

Mask = Callable[[Example], list[bool]]
OverLong = Literal["error", "drop", "truncate"]
Span = tuple[int, int]

TODAY = datetime(2024, 7, 26)  # what `strftime_now` says: Llama 3's own default; a clock would change the ids every day
_BLOCK, _BLOCK_END, _TYPED, _TYPED_END, _EDGE, _EDGE_END = (chr(0x10FFF0 + i) for i in range(6))
_MARKS = re.compile("[\U0010fff0-\U0010fff5]")  # the last private-use characters; refused in data and templates
_EDGES = re.compile(f"[{_EDGE}{_EDGE_END}](\\d+)[{_EDGE}{_EDGE_END}]")
_STRADDLES = "a token spans the border between prompt and completion: generation will meet another one"
_CHOICES = (
    "use a tokenizer that has one (usually the chat or instruct variant of the model); or pass a template; "
    "or write rows as prompt and completion text, which are joined plainly and need none"
)


@dataclass(frozen=True)
class Prepared:
    """Rows ready to train on. notices: what a reader should know, with the number of rows it concerns."""

    rows: tuple[Rendered, ...]
    dropped: Dropped
    notices: Mapping[str, int]
    tokens: int
    label_tokens: int
    longest: int


@dataclass(frozen=True)
class _Page:
    """A rendered conversation. `typed`: control tokens written by people; `blocks`: what {% generation %} surrounds."""

    text: str
    typed: tuple[Span, ...] = ()
    blocks: tuple[Span, ...] = ()


@dataclass(frozen=True)
class _Turn:
    """Characters to learn, and who said so.

    written   prefix rendering: from the generation prompt to the turn's terminator
    marked    the template's blocks as they are, and the terminator if it follows the last of them, before `bound`
    whole     everything in the spans
    """

    spans: tuple[Span, ...]
    how: Literal["written", "marked", "whole"]
    bound: int


@dataclass(frozen=True)
class _Encoded:
    """Token ids and the characters [start, end) each covers; `control`: a control token the template itself wrote."""

    ids: tuple[int, ...]
    start: tuple[int, ...]
    end: tuple[int, ...]
    control: tuple[bool, ...]


class ChatFormat:
    """Renders examples with one tokenizer and its chat template (or `template`, Jinja source given in its place).

    Without a template only one prompt answered by one completion can be rendered: the two texts joined, then the end
    token. `notices` counts, by row, what was decided on the way. Raises DataError for a template that cannot be used.
    """

    def __init__(self, tokenizer: Any, *, template: str | None = None, today: datetime = TODAY) -> None:
        self.tokenizer = tokenizer
        self.notices: Counter[str] = Counter()
        source = template if template is not None else _own_template(tokenizer)
        self.template_sha256 = None if source is None else hashlib.sha256(source.encode()).hexdigest()
        self._template = None if source is None else _Template(source, dict(tokenizer.special_tokens_map), today)
        special = set(tokenizer.all_special_ids)
        self._control = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or index in special
        }
        self._control_ids = frozenset(self._control.values())
        longest_first = sorted(self._control, key=len, reverse=True)
        self._typed = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @property
    def has_template(self) -> bool:
        return self._template is not None

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an assistant turn, at any of which generation stops: the tokenizer's, and the template's."""
        found = {self.tokenizer.eos_token_id}
        if self._template is not None:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            try:
                page = _unmarked(self._template.render(turns, False, "chat template"), "chat template")
                encoded = self._encode(page, (), "chat template")
            except BadRow:  # this template wants other turns; rows are judged one by one
                return tuple(sorted(found - {None}))
            last = _terminator(encoded, page.text, 0, len(page.text))
            found.add(None if last is None else encoded.ids[last])
        return tuple(sorted(found - {None}))

    # ---- what callers ask for ---------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message], *, where: str = "prompt") -> tuple[int, ...]:
        """Ids that ask for the next assistant turn. Raises DataError where the last turn is not one to answer."""
        if not messages or messages[-1].role not in ("user", "tool"):
            raise BadRow("no prompt", "a prompt ends with a user or a tool turn", where=where)
        if self._template is None:
            if len(messages) > 1:
                raise self._needs_template(where)
            return self._lead + self._encode(self._joined_page(messages, where), (), where).ids
        page = self._page(messages, True, where)
        self._check_kept(messages, self._edged(messages, True), page, True, where)
        ids = self._encode(page, (), where).ids
        self._check_beginning(ids, where)
        return ids

    def render(self, example: Example, mask: Mask) -> Rendered:
        """Ids of a whole example and which are labels (possibly none). Raises DataError as the module promises."""
        where = example.where or "example"
        if example.text is not None:
            return self._document(example.text, where)
        messages = (*example.prompt, *example.completion)
        if not example.completion:
            raise BadRow("no completion", "has a prompt and nothing to learn after it", where=where)
        if len(chosen := mask(example)) != len(messages):
            message = f"the mask {_name(mask)!r} gave {len(chosen)} flags for {len(messages)} messages"
            raise DataError(message, where=where)
        for index, turn in enumerate(messages):
            self._check_ending(turn, index, where)
        if self._template is None:
            return self._joined(messages, chosen, where)
        page = self._page(messages, False, where)
        edged = self._edged(messages, False)
        self._check_kept(messages, edged, page, False, where)
        if any(pick and turn.role != "assistant" for pick, turn in zip(chosen, messages)):
            turns = [self._whole_turns(messages, chosen, page, where)]
        elif page.blocks:
            turns = self._marked_turns(messages, chosen, edged, page, where)
        else:
            turns = self._written_turns(messages, chosen, page, where)
        encoded = self._encode(page, [edge for turn in turns for span in turn.spans for edge in span], where)
        self._check_beginning(encoded.ids, where)
        trained = [False] * len(encoded.ids)
        straddles = [self._label(trained, turn, encoded, page, where) for turn in turns]
        if any(straddles):
            self.notices[_STRADDLES] += 1
        return Rendered(encoded.ids, (False, *trained[1:]), where)  # token 0 has no predictor

    def render_all(
        self,
        examples: Iterable[Example],
        mask: Mask,
        *,
        conversational: bool = True,
        max_tokens: int | None = None,
        over_long: OverLong = "error",
        on_bad_row: OnBadRow = "error",
        dropped: Dropped | None = None,
    ) -> Prepared:
        """Render a data set. `conversational=False` says that rows were plain strings, which need no template.

        Rows longer than `max_tokens` are refused together with their number (`over_long="error"`), dropped, or cut at
        the end. Rows without a label are refused together, but those that lost theirs to the cut are dropped. Raises
        DataError for these, for a row that cannot be rendered (`on_bad_row="skip"`: counted), and when none is left.
        """
        if conversational and self._template is None:
            raise self._needs_template("chat template")
        before, dropped = Counter(self.notices), dropped if dropped is not None else Dropped()
        rows: list[Rendered] = []
        silent: list[str] = []
        too_long: list[tuple[int, str]] = []
        seen, last = 0, "rows"
        for example in examples:
            seen, last = seen + 1, example.where or last
            try:
                row = self.render(example, mask)
            except BadRow as bad:
                if on_bad_row == "error":
                    raise
                dropped.add(bad.reason, last)
                continue
            if not conversational and example.text is None and self._template is not None:
                self.notices["prompt and completion text shown as a user and an assistant turn"] += 1
            fits = max_tokens is None or len(row.ids) <= max_tokens
            if not any(row.trained):
                silent.append(row.where)
            elif fits:
                rows.append(row)
            elif over_long == "error":
                too_long.append((len(row.ids), row.where))
            elif over_long == "drop":
                dropped.add(f"longer than {max_tokens} tokens", row.where)
            elif any(row.trained[:max_tokens]):
                self.notices[f"cut to {max_tokens} tokens"] += 1
                rows.append(Rendered(row.ids[:max_tokens], row.trained[:max_tokens], row.where))
            else:
                dropped.add(f"no label within {max_tokens} tokens", row.where)
        if too_long:
            longest = max(too_long)[0]
            message = f"{len(too_long)} of {seen} rows are longer than {max_tokens} tokens (longest: {longest})"
            remedy = f"max_tokens: {longest}, or on_long_row: drop, or on_long_row: truncate"
            raise DataError(message, where=too_long[0][1], remedy=remedy)
        if silent and on_bad_row == "error":
            message = f"{len(silent)} of {seen} rows have no label under the mask {_name(mask)!r}; the first"
            raise DataError(message, where=silent[0], remedy="remove these rows, or choose another mask")
        for where in silent:
            dropped.add("no label", where)
        if not rows:
            raise nothing_left(last.rsplit(":", 1)[0], dropped)
        return Prepared(
            rows=tuple(rows),
            dropped=dropped,
            notices=dict(self.notices - before),
            tokens=sum(len(row.ids) for row in rows),
            label_tokens=sum(sum(row.trained) for row in rows),
            longest=max(len(row.ids) for row in rows),
        )

    # ---- pages ------------------------------------------------------------------------------------------------------

    def _page(self, messages: Sequence[Message], generation_prompt: bool, where: str) -> _Page:
        """The conversation in characters; control tokens typed by people are marked on the way through the template."""
        assert self._template is not None
        for turn in messages:
            if _MARKS.search(turn.content):
                raise BadRow("private characters", "holds one of U+10FFF0 to U+10FFF5, which are reserved", where=where)
        wrap = f"{_TYPED}\\g<0>{_TYPED_END}"
        turns = [{"role": t.role, "content": self._typed.sub(wrap, t.content)} for t in messages]
        page = _unmarked(self._template.render(turns, generation_prompt, where), where)
        if any(self._typed.search(turn.content) for turn in messages):
            unwrapped = _unmarked(self._template.render(_plain(messages), generation_prompt, where), where)
            if unwrapped.text != page.text:
                message = "the chat template acts on a control token typed inside a message"
                raise BadRow("typed control tokens", message, where=where, remedy="remove it from the data")
        return page

    def _edged(self, messages: Sequence[Message], generation_prompt: bool) -> str | None:
        """The conversation with each content between numbered marks: those that are left show what was kept."""
        assert self._template is not None
        turns = [
            {"role": t.role, "content": f"{_EDGE}{i}{_EDGE}{t.content}{_EDGE_END}{i}{_EDGE_END}" if t.content else ""}
            for i, t in enumerate(messages)
        ]
        try:
            return self._template.render(turns, generation_prompt, "chat template")
        except BadRow:  # a template may insist on how contents begin
            return None

    def _check_kept(
        self, messages: Sequence[Message], edged: str | None, page: _Page, asking: bool, where: str
    ) -> None:
        """A template may trim blanks (counted) and take reasoning out of assistant turns; nothing else may get lost."""
        assert self._template is not None
        for index, turn in enumerate(messages):
            if not turn.content:
                continue
            begin, end = f"{_EDGE}{index}{_EDGE}", f"{_EDGE_END}{index}{_EDGE_END}"
            if edged is None:
                kept = turn.content.strip() in page.text
            elif turn.role == "system":
                kept = f"{begin}{turn.content}{end}" in edged
            elif turn.role == "assistant":
                kept = begin in edged or end in edged
            else:
                kept = begin in edged and end in edged
            if not kept:
                message = f"the chat template drops or changes turn {index}, a {turn.role} turn"
                remedy = "remove such turns, fold them into the user's, or pass a template that shows them"
                raise BadRow("turn dropped by the template", message, where=where, remedy=remedy)
        for system in (True, False):
            roles = [turn.role for turn in messages if turn.content != turn.content.strip()]
            if not any((role == "system") == system for role in roles):
                continue
            trimmed = [
                {"role": t.role, "content": t.content.strip() if (t.role == "system") == system else t.content}
                for t in messages
            ]
            if _unmarked(self._template.render(trimmed, asking, where), where).text != page.text:
                continue
            if system:
                message = "the chat template trims the blanks around the system turn"
                raise BadRow("system turn trimmed", message, where=where, remedy="strip the system text in the data")
            self.notices["blanks around a turn trimmed by the chat template"] += 1

    def _prefix(self, messages: Sequence[Message], generation_prompt: bool, page: _Page, index: int, where: str) -> int:
        """Characters of `page` that these first messages render to. Raises where they render to something else."""
        text = self._page(messages, generation_prompt, where).text
        if page.text.startswith(text):
            return len(text)
        at = next((i for i, (a, b) in enumerate(zip(text, page.text)) if a != b), min(len(text), len(page.text)))
        what = "its generation prompt" if generation_prompt else f"turn {index} alone"
        message = (
            f"the chat template breaks the prefix property at turn {index}: {what} has {text[at : at + 30]!r} where "
            f"the whole conversation has {page.text[at : at + 30]!r}; training would not match generation"
        )
        remedy = (
            "pass a template with {% generation %} blocks, or one whose turns begin as its generation prompt does; "
            "for an earlier turn, mask: completion learns the last one alone"
        )
        raise BadRow("prefix property violated", message, where=where, remedy=remedy)

    # ---- turns to learn ---------------------------------------------------------------------------------------------

    def _written_turns(
        self, messages: Sequence[Message], chosen: Sequence[bool], page: _Page, where: str
    ) -> list[_Turn]:
        """Prefix rendering: an assistant turn is what the conversation adds to the generation prompt before it."""
        turns: list[_Turn] = []
        for index in (i for i, pick in enumerate(chosen) if pick):
            last = index + 1 == len(messages)
            begin = self._prefix(messages[:index], True, page, index, where)
            end = len(page.text) if last else self._prefix(messages[: index + 1], False, page, index, where)
            turns.append(_Turn(((begin, end),), "written", end))
        return turns

    def _marked_turns(
        self, messages: Sequence[Message], chosen: Sequence[bool], edged: str | None, page: _Page, where: str
    ) -> list[_Turn]:
        """The template's own {% generation %} blocks, each given to the turn whose content it holds or stands beside."""
        owners: list[int] = []
        for block in re.finditer(f"{_BLOCK}(.*?){_BLOCK_END}", edged or "", re.DOTALL):
            inside = _EDGES.search(block[1])
            before = int(([m[1] for m in _EDGES.finditer(edged or "", 0, block.start())] or ["0"])[-1])
            beside = before if messages[before].role == "assistant" else before + 1
            owners.append(int(inside[1]) if inside else beside)
        if len(owners) != len(page.blocks):
            message = "the {% generation %} blocks of the chat template cannot be matched with the turns"
            raise BadRow("generation block", message, where=where, remedy="put one block around each assistant content")
        turns: list[_Turn] = []
        for index in (i for i, pick in enumerate(chosen) if pick):
            spans = tuple(s for s, owner in zip(page.blocks, owners) if owner == index and s[0] < s[1])
            if not spans:
                message = f"the chat template has no {{% generation %}} block for turn {index}"
                raise BadRow("generation block", message, where=where, remedy="put a block around every assistant turn")
            after = [begin for begin, _ in page.blocks if begin >= spans[-1][1]]
            turns.append(_Turn(spans, "marked", min(after, default=len(page.text))))
        return turns

    def _whole_turns(self, messages: Sequence[Message], chosen: Sequence[bool], page: _Page, where: str) -> _Turn:
        """Everything except the turns not chosen, headers and all."""
        spans: list[Span] = []
        begin = 0
        for index in (i for i, pick in enumerate(chosen) if not pick):
            spans.append((begin, self._prefix(messages[:index], False, page, index, where) if index else 0))
            last = index + 1 == len(messages)
            begin = len(page.text) if last else self._prefix(messages[: index + 1], False, page, index, where)
        spans.append((begin, len(page.text)))
        return _Turn(tuple(span for span in spans if span[0] < span[1]), "whole", len(page.text))

    def _label(self, trained: list[bool], turn: _Turn, encoded: _Encoded, page: _Page, where: str) -> bool:
        """Set True for the tokens that show any character of the turn. Returns whether one of them began before it."""
        begin, end = turn.spans[0][0], turn.spans[-1][1]
        if turn.how == "whole":
            last = _terminator(encoded, page.text, 0, len(page.text))
        else:
            last = _terminator(encoded, page.text, turn.spans[-1][0], end)
        if last is None and turn.how == "marked":
            last = next((i for i, start in enumerate(encoded.start) if start >= end), None)
            if last is not None and not (encoded.ids[last] in self.end_ids and encoded.end[last] <= turn.bound):
                last = None
        if last is None:
            shown = page.text[max(begin, end - 30) : end]
            message = f"no control token follows the assistant's {shown!r}: the model would never learn to stop"
            remedy = "write {{ eos_token }} after assistant turns in the chat template"
            raise BadRow("no terminator", message, where=where, remedy=remedy)
        for index, (start, stop) in enumerate(zip(encoded.start, encoded.end)):
            if any(start < b and max(stop, start + 1) > a for a, b in turn.spans):
                trained[index] = turn.how != "written" or index <= last
        trained[last] = trained[last] or turn.how == "marked"
        return turn.how != "whole" and any(a < begin < b for a, b in zip(encoded.start, encoded.end))

    # ---- rows without a template ------------------------------------------------------------------------------------

    def _joined(self, messages: Sequence[Message], chosen: Sequence[bool], where: str) -> Rendered:
        """prompt + completion + end token."""
        if [turn.role for turn in messages] != ["user", "assistant"]:
            raise self._needs_template(where)
        self.notices["no chat template: prompt, completion and end token are joined plainly"] += 1
        border = len(messages[0].content)
        encoded = self._encode(self._joined_page(messages, where), (border,), where)
        if any(start < border < end for start, end in zip(encoded.start, encoded.end)):
            self.notices[_STRADDLES] += 1
        labels = [chosen[1] if end > border else chosen[0] for end in encoded.end]
        ids = (*self._lead, *encoded.ids, self._eos(where))
        trained = (*[chosen[0]] * len(self._lead), *labels, chosen[1])
        return Rendered(ids, (False, *trained[1:]), where)

    def _joined_page(self, messages: Sequence[Message], where: str) -> _Page:
        text = "".join(turn.content for turn in messages)
        return _Page(text, tuple(match.span() for match in self._typed.finditer(text)))

    def _document(self, text: str, where: str) -> Rendered:
        """A `text` row is its author's final form: control tokens in it are recognised, and each end is there once."""
        encoded = self._encode(_Page(text), (), where)
        if any(encoded.control):
            self.notices["control tokens written in text rows are recognised"] += 1
        lead = self._lead if encoded.ids[: len(self._lead)] != self._lead else ()
        eos = self._eos(where)
        ids = (*lead, *encoded.ids, *(() if encoded.ids[-1:] == (eos,) else (eos,)))
        return Rendered(ids, (False, *[True] * (len(ids) - 1)), where)

    def _eos(self, where: str) -> int:
        if self.tokenizer.eos_token_id is None:
            message = "the tokenizer has no end token, so the model would never learn to stop"
            raise DataError(message, where=where, remedy="set eos_token in its tokenizer_config.json")
        return self.tokenizer.eos_token_id

    @cached_property
    def _lead(self) -> tuple[int, ...]:
        """What the tokenizer puts before plain text (usually a begin token, or nothing)."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        starts = [k for k in range(len(full) - len(bare) + 1) if full[k : k + len(bare)] == bare]
        return tuple(full[: starts[0]]) if starts else ()

    def _needs_template(self, where: str) -> DataError:
        message = "the tokenizer has no chat template, and these rows are conversations"
        return DataError(message, where=where, remedy=_CHOICES)

    def _check_ending(self, turn: Message, index: int, where: str) -> None:
        ends = [text for text, token in self._control.items() if token in self.end_ids]
        end = next((text for text in ends if turn.content.rstrip().endswith(text)), None)
        if turn.role == "assistant" and end is not None:
            message = f"turn {index} ends with {end!r} typed as text; the end token is added here"
            raise BadRow("end token typed", message, where=where, remedy=f"remove {end!r} from the data")

    def _check_beginning(self, ids: Sequence[int], where: str) -> None:
        bos = self.tokenizer.bos_token_id
        if not ids:
            raise DataError("the chat template renders to nothing", where=where)
        if bos is not None and tuple(ids[:2]) == (bos, bos):
            message = f"the chat template writes {self.tokenizer.bos_token!r} twice at the beginning"
            raise DataError(message, where=where, remedy="remove one {{ bos_token }} from the template")

    # ---- characters to tokens ---------------------------------------------------------------------------------------

    def _encode(self, page: _Page, cuts: Iterable[int], where: str) -> _Encoded:
        """Encode the page once as a whole; only typed control tokens are cut out, and encoded as ordinary text.

        `cuts` are used by tokenizers without offsets alone: they encode between them, and are refused where that
        differs from the whole.
        """
        if page.typed:
            self.notices["control tokens typed inside messages are encoded as plain text"] += 1
        if self._backend is None:
            return self._encode_pieces(page, cuts, where)
        ids: list[int] = []
        offsets: list[Span] = []
        control: list[bool] = []
        edges = sorted({0, len(page.text), *(edge for span in page.typed for edge in span)})
        for a, b in pairwise(edges):
            backend = self._typed_backend if (a, b) in page.typed else self._backend
            piece = backend.encode(page.text[a:b], add_special_tokens=False)
            ids += piece.ids
            offsets += [(a + start, a + stop) for start, stop in piece.offsets]
            control += [index in self._control_ids for index in piece.ids]
            if (a, b) in page.typed and any(control[-len(piece.ids) :]):
                raise self._inseparable(page.text[a:b], where)
        if page.typed:
            whole = self._backend.encode(page.text, add_special_tokens=False).ids
            if self._decode(ids) != self._decode(whole):
                raise self._inseparable(page.text[slice(*page.typed[0])], where)
        if self.tokenizer.unk_token_id in ids:
            self.notices["text the tokenizer has no tokens for became its unknown token"] += 1
        return _Encoded(tuple(ids), tuple(a for a, _ in offsets), tuple(b for _, b in offsets), tuple(control))

    def _encode_pieces(self, page: _Page, cuts: Iterable[int], where: str) -> _Encoded:
        controls = {match.span() for match in self._typed.finditer(page.text)}
        edges = sorted({0, len(page.text), *cuts, *(edge for span in controls for edge in span)})
        found: list[tuple[int, int, int, bool]] = []
        for a, b in pairwise(edges):
            if (a, b) in controls:
                found.append((self._control[page.text[a:b]], a, b, True))
            else:
                found += [(i, a, b, False) for i in self.tokenizer.encode(page.text[a:b], add_special_tokens=False)]
        if page.typed or [i for i, *_ in found] != self.tokenizer.encode(page.text, add_special_tokens=False):
            message = "this tokenizer has no offsets, and its pieces do not add up to the whole"
            raise BadRow("tokenizer without offsets", message, where=where, remedy="load its fast version")
        return _Encoded(*(tuple(column) for column in zip(*found))) if found else _Encoded((), (), (), ())

    @cached_property
    def _backend(self) -> Any:
        """A private copy of the fast tokenizer, without a post-processor: some of those move offsets off blanks.

        None where there is no fast tokenizer, or where its Python shell does more than the copy would.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        probe = "Ab 12,\n\n  é漢 " + "".join(self._control)
        try:
            copy = _copy(self.tokenizer.backend_tokenizer)
        except Exception:  # tokenizers raises nothing narrower for parts written in Python, which cannot be copied
            return None
        same = copy.encode(probe, add_special_tokens=False).ids
        return copy if same == self.tokenizer(probe, add_special_tokens=False)["input_ids"] else None

    @cached_property
    def _typed_backend(self) -> Any:
        copy = _copy(self.tokenizer.backend_tokenizer)
        copy.encode_special_tokens = True  # tokenizers' name for: do not look for special tokens in the text
        return copy

    def _inseparable(self, text: str, where: str) -> BadRow:
        message = f"{text!r} is typed inside a message, and this tokenizer cannot encode it as plain text"
        return BadRow("typed control tokens", message, where=where, remedy="remove it from the data")

    def _decode(self, ids: Sequence[int]) -> str:
        return _decode(self.tokenizer, ids)


def preview(rendered: Rendered, tokenizer: Any) -> list[list[Any]]:
    """[[text, is it a label], ...] by token, joining those that share a character; the texts add up to decode(ids)."""
    pieces: list[list[Any]] = []
    shown = done = 0  # tokens decoded for context, and tokens already in `pieces`
    for upto in range(1, len(rendered.ids) + 1):
        text = _decode(tokenizer, rendered.ids[shown:upto])
        if text.endswith("\ufffd") and upto < len(rendered.ids):
            continue  # half of a character so far
        before = _decode(tokenizer, rendered.ids[shown:done])
        pieces.append([text[len(before) :], rendered.trained[upto - 1]])
        shown, done = done, upto
    return pieces


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _name(mask: Mask) -> str:
    return getattr(mask, "__name__", "mask")


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _copy(backend: Any) -> Any:
    copy = type(backend).from_str(backend.to_str())
    copy.post_processor = None
    copy.encode_special_tokens = False
    copy.no_truncation()
    copy.no_padding()
    return copy


def _plain(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in messages]


def _terminator(encoded: _Encoded, text: str, begin: int, end: int) -> int | None:
    """The last control token within [begin, end), if only blanks follow it there."""
    for index in reversed(range(len(encoded.ids))):
        if encoded.control[index] and begin <= encoded.start[index] and encoded.end[index] <= end:
            return index if not text[encoded.end[index] : end].strip() else None
    return None


def _unmarked(marked: str, where: str) -> _Page:
    """Take the marks out and say where they stood."""
    texts: list[str] = []
    spans: dict[str, list[Span]] = {_TYPED: [], _BLOCK: []}
    opened: dict[str, int] = {}
    closes = {_TYPED_END: _TYPED, _BLOCK_END: _BLOCK}
    at = 0
    for piece in re.split(f"({_MARKS.pattern})", marked):
        if piece in spans and piece not in opened:
            opened[piece] = at
        elif piece in closes and closes[piece] in opened:
            spans[closes[piece]].append((opened.pop(closes[piece]), at))
        elif _MARKS.fullmatch(piece):
            opened[piece] = at  # out of place: reported below
            break
        else:
            texts.append(piece)
            at += len(piece)
    if opened:
        message = "the chat template takes a typed control token apart, or nests {% generation %} blocks"
        raise BadRow("typed control tokens", message, where=where, remedy="remove control tokens from the data")
    return _Page("".join(texts), tuple(spans[_TYPED]), tuple(spans[_BLOCK]))


def _own_template(tokenizer: Any) -> str | None:
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, Mapping):
        if len(found) > 1 and "default" not in found:
            names = ", ".join(sorted(found))
            message = f"the tokenizer has several chat templates and no default: {names}"
            raise DataError(message, where="chat template", remedy="pass the one to use")
        return found.get("default") or next(iter(found.values()), None)
    return found


# ---- the sandbox ----------------------------------------------------------------------------------------------------

SOURCE_LIMIT = 128 * 1024  # characters of a template; the longest in use have about 30,000
STEPS = 1_000_000  # loop turns, calls, and sixteens of characters made by one rendering, beside what its input allows
DEADLINE_S = 10.0
INTEGER_BITS = 1024
# A width of four digits, or one taken from an argument: in % formats, and in {} formats.
_WIDE = re.compile(r"%(\([^)]*\))?[-+ #.\d]*(\d{4}|\*)|\{[^{}]*(\d{4}|\{)")

# Each of these makes much from little in a single call, which no counter could stop in time, or is random.
_NO_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "encode", "format_map", "to_bytes")
_NO_FILTERS = ("attr", "batch", "center", "filesizeformat", "pprint", "random", "slice", "striptags", "truncate")
_NO_FILTERS += ("urlencode", "urlize", "wordwrap", "xmlattr")


class _Exhausted(Exception):
    """The meter ran out, of the steps or the time that its message says."""


class _Meter:
    """What one rendering may still do. Every value made is charged for, so none can be much larger than the budget."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.deadline = time.monotonic() + DEADLINE_S

    def charge(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise _Exhausted(f"{STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise _Exhausted(f"{DEADLINE_S:.0f} s")

    def weigh(self, value: Any) -> Any:
        """Charge for a value that was made, all it holds included: shared parts count as often as they would print."""
        stack = [value]
        while stack:
            item = stack.pop()
            self.charge(1 + len(item) // 16 if isinstance(item, str) else 1)
            if isinstance(item, dict):
                stack += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                stack += item
        return self.counted(value) if isinstance(value, Iterator) else value

    def counted(self, items: Iterator[Any], steps: int = 1) -> Iterator[Any]:
        for item in items:
            self.charge(steps)
            yield item

    def grown(self, size: int) -> None:
        """Charge for characters or items before they are made."""
        self.charge(1 + max(0, size) // 16)


_METER: ContextVar[_Meter] = ContextVar("meter")


class _Template:
    """A chat template in the environment transformers renders it in, with every loop, call and product metered.

    What transformers allows and this does not: recursive loops, `include` and its kin, and the filters and methods in
    `_NO_FILTERS` and `_NO_METHODS`.
    """

    def __init__(self, source: str, names: Mapping[str, Any], today: datetime) -> None:
        self._names = {key: str(value) for key, value in names.items() if value is not None}
        where = "chat template"
        if len(source) > SOURCE_LIMIT:
            raise DataError(f"has {len(source):,} characters, over the limit of {SOURCE_LIMIT:,}", where=where)
        if _MARKS.search(source):
            raise DataError("holds one of U+10FFF0 to U+10FFF5, which are reserved", where=where)
        environment = _Environment(today)
        _METER.set(_Meter(STEPS))  # constants are folded while compiling
        try:
            self._compiled = environment.from_string(source)
        except _Exhausted as limit:
            raise self._too_much(limit, where) from None
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise DataError(f"is not valid: {error}", where=f"{where}:{line}" if line else where) from error
        except (RecursionError, SyntaxError, OverflowError, ValueError, MemoryError) as error:
            raise DataError(f"cannot be compiled: {type(error).__name__}: {error}", where=where) from error

    def render(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool, where: str) -> str:
        """Raises BadRow where the template refuses these messages, DataError where it does what the sandbox forbids."""
        size = sum(len(message["content"]) for message in messages)
        _METER.set(_Meter(STEPS + 32 * size + 2000 * len(messages)))
        given = {"messages": [dict(m) for m in messages], "add_generation_prompt": generation_prompt}
        try:
            context = self._compiled.new_context({**self._names, "tools": None, "documents": None, **given})
            return "".join(self._compiled.root_render_func(context))
        except _Exhausted as limit:
            raise self._too_much(limit, where) from None
        except SecurityError as error:
            remedy = "do not use this tokenizer's template: it reaches for what no chat template needs"
            message = f"the chat template was stopped by the sandbox: {error}"
            raise DataError(message, where=where, remedy=remedy) from error
        except TemplateError as error:
            message = f"the chat template refuses this row: {error}"
            raise BadRow("refused by the template", message, where=where) from error
        except Exception as error:  # whatever else a template's own code raises
            message = f"the chat template fails: {type(error).__name__}: {error}"
            raise BadRow("refused by the template", message, where=where) from error

    @staticmethod
    def _too_much(limit: _Exhausted, where: str) -> DataError:
        message = f"the chat template takes more than {limit} and was stopped"
        return DataError(message, where=where, remedy="do not use this tokenizer's template")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self, today: datetime) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=lambda value: _METER.get().weigh(value),
        )
        allowed = {name: row for name, row in FILTERS.items() if name not in _NO_FILTERS}
        own = {"format": _format, "indent": _indent, "join": _join, "replace": _replace, "tojson": _tojson, "safe": str}
        self.filters = {name: _weighed(row) for name, row in (allowed | own).items()}
        self.filters |= {"_loop": _loop, "_made": lambda value: _METER.get().weigh(value), "_concat": _concat}
        self.globals.pop("lipsum")
        self.globals |= {
            "range": _range,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
            "raise_exception": _raise,
            "strftime_now": lambda form: today.strftime(form),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Metered(self).visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        amplifies = isinstance(obj, str | int) and attr in _NO_METHODS
        return not amplifies and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuses at once: jinja2 gives a value that fails when used, but prints as nothing."""
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} value")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDE.search(value.__self__):
            raise SecurityError("a format string with a width this large, or a nested one")
        return wrapped

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _METER.get().charge(16)  # a call takes about as long as this many turns of a loop
        text = getattr(obj, "__self__", None)
        if isinstance(text, str) and obj.__name__ == "replace":
            _grow_by_replacing(text, *args[:2])
        if isinstance(text, str) and obj.__name__ == "join":
            args = (_joinable(text, args[0]),)
        return _METER.get().weigh(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _METER.get()
        meter.charge(1)
        sized: list[Any] = [value for value in (left, right) if isinstance(value, str | list | tuple)]
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= 64):
            raise SecurityError("an exponent over 64")
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("a format string with a width this large")
        if operator == "*" and sized:
            count = right if sized[0] is left else left
            meter.grown(len(sized[0]) * (int(count) if isinstance(count, int) else 0))
        made = super().call_binop(context, operator, left, right)
        if isinstance(made, int) and made.bit_length() > INTEGER_BITS:
            raise SecurityError(f"an integer of more than {INTEGER_BITS} bits")
        return meter.weigh(made)


class _Metered(NodeTransformer):
    """Rewrites a parsed template so that loops, literals, slices and `~` pass through metered filters."""

    def __init__(self, environment: _Environment) -> None:
        self.environment = environment

    def _through(self, name: str, node: nodes.Node, *args: nodes.Expr) -> nodes.Expr:
        made = nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)
        made.set_environment(self.environment)
        return made

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not supported", node.lineno)
        written = [*node.find_all(nodes.TemplateData), *node.find_all(nodes.Const)]
        size = sum(len(n.data if isinstance(n, nodes.TemplateData) else str(n.value)) for n in written)
        self.generic_visit(node)
        node.iter = self._through("_loop", node.iter, nodes.Const(1 + size // 16, lineno=node.lineno))
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        sliced = isinstance(node.arg, nodes.Slice)
        self.generic_visit(node)
        return self._through("_made", node) if sliced else node

    def visit_List(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return self._through("_made", node) if getattr(node, "ctx", "load") == "load" else node

    visit_Tuple = visit_Dict = visit_List

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return self._through("_concat", nodes.List(node.nodes, lineno=node.lineno).set_environment(self.environment))


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what the assistant writes, as in transformers."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own convention)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{_BLOCK}{caller()}{_BLOCK_END}"


class _Namespace(Namespace):
    """jinja2's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` may be a name in it, as in jinja2
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _public(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a name that begins with an underscore: {name}")


def _weighed(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps jinja_pass_arg
    def weighed(*args: Any, **kwargs: Any) -> Any:
        _METER.get().charge(1)
        return _METER.get().weigh(function(*args, **kwargs))

    return weighed


def _loop(items: Any, steps: int) -> Any:
    if isinstance(items, list | tuple | dict | str | range):
        _METER.get().charge(steps * len(items))
        return items
    return _METER.get().counted(iter(items), steps)


def _concat(items: list[Any]) -> str:
    texts = [str(_METER.get().weigh(item)) for item in items]
    _METER.get().grown(sum(map(len, texts)))
    return "".join(texts)


def _range(*args: int) -> range:
    made = range(*args)
    _METER.get().charge(len(made))
    return made


def _raise(message: str) -> None:
    raise TemplateError(message)


def _joinable(separator: str, items: Iterable[Any]) -> list[Any]:
    found = list(_METER.get().counted(iter(items)))
    _METER.get().grown(sum(len(item) + len(separator) for item in found if isinstance(item, str)))
    return found


@pass_environment
def _join(environment: Any, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    items = value if attribute is None else [environment.getitem(item, attribute) for item in value]
    return str(d).join(_joinable(str(d), (str(_METER.get().weigh(item)) for item in items)))


def _grow_by_replacing(text: str, old: Any, new: Any) -> None:
    _METER.get().grown(len(text) + text.count(str(old)) * len(str(new)))


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _grow_by_replacing(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    if _WIDE.search(str(text)):
        raise SecurityError("a format string with a width this large")
    return str(text) % (kwargs or args)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = width if isinstance(width, int) else len(width)
    _METER.get().grown(len(str(text)) + (str(text).count("\n") + 1) * size)
    return FILTERS["indent"](str(text), width, first, blank)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if (indent if isinstance(indent, int) else len(indent or "")) > 16 or any(len(s) > 16 for s in separators or ()):
        raise SecurityError("an indent or separator over 16")
    _METER.get().weigh(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
