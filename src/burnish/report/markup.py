"""HTML that cannot be injected into: text and markup are two types, and only `Markup` is written as it stands.

Everything a model, a data file or a recipe says is text. Characters that could hide or reorder what is read (control
characters, direction overrides, invisible tags) are written out as visible escapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

BARE = frozenset({"title", "text", "option"})  # hold text only: an element inside would show as text, or end the chart
VOID = frozenset({"meta", "br", "input", "col", "hr", "line", "circle", "rect", "polyline", "path"})
# C0 (but for tab and newline), DEL and C1; soft hyphen; direction marks, overrides and isolates; invisible separators and
# joiners (not ZWJ, ZWNJ: emoji and scripts need them); surrogates, interlinear marks, noncharacters, tag characters.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufdd0-\ufdef"
    "\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e0fff\U000f0000-\U0010ffff]+"
)
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;", "`": "&#96;"}
_UNSAFE = re.compile("[" + "".join(_ESCAPES) + "]")
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*")
_HANDLER = re.compile(r"(on.*|src|srcdoc|style|action|formaction|xlink.*)", re.IGNORECASE)


class Markup(str):
    """HTML made by `tag`, `text` or `join`: never escaped again."""

    __slots__ = ()


Child = str | int | None | Iterable["Child"]


def visible(value: str) -> str:
    """The text with every hidden character spelled out: NUL becomes `\\x00`, a right-to-left override `\\u202e`."""
    return HIDDEN.sub(lambda match: "".join(map(_spelled, match[0])), value.replace("\r\n", "\n"))


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _escape(value: str) -> str:
    return _UNSAFE.sub(lambda m: _ESCAPES[m[0]], value)


def text(value: str) -> Markup:
    """Text as HTML, the spelled-out hidden characters marked so that they are not taken for what was written."""
    value = value.replace("\r\n", "\n")
    parts, last = [], 0
    for match in HIDDEN.finditer(value):
        parts.append(_escape(value[last : match.start()]))
        parts.append(f'<span class="hidden-character">{_escape(visible(match[0]))}</span>')
        last = match.end()
    return Markup("".join([*parts, _escape(value[last:])]))


def join(*children: Child) -> Markup:
    """Children one after the other: markup as it stands, text escaped, None left out."""
    return Markup("".join(_child(child) for child in children))


def _child(child: Child) -> str:
    match child:
        case None:
            return ""
        case Markup():
            return child
        case str():
            return text(child)
        case int():
            return str(child)
        case _:
            return "".join(_child(each) for each in child)


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """One element. `class_` is class and `stroke_width` stroke-width; True is a bare attribute, None and False none at all.

    Raises ValueError on an attribute that can run or load something, on a link that leaves the page, and on an odd name.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no element")
    made = [f"<{name}"]
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        if value is None or value is False:
            continue
        if not _NAME.fullmatch(attribute) or _HANDLER.fullmatch(attribute):
            raise ValueError(f"{attribute!r} has no place in a report")
        if attribute == "href" and not re.fullmatch(r"#[a-z0-9-]+", str(value)):
            raise ValueError(f"a report links to its own parts only, not to {value!r}")
        if value is True:
            made.append(f" {attribute}")
        else:
            said = f"{value:.6g}" if isinstance(value, float) else visible(str(value))
            made.append(f' {attribute}="{_escape(said)}"')
    if name in BARE:
        children = tuple(Markup(_escape(visible(c))) if isinstance(c, str) and not isinstance(c, Markup) else c for c in children)
    if name in VOID and not children:
        return Markup("".join([*made, ">" if name in ("meta", "br", "input", "col", "hr") else "/>"]))
    return Markup("".join([*made, ">", join(*children), f"</{name}>"]))
