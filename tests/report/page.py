"""A page as a tree, read by the standard library's parser, so that tests look at structure and not at text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

EMPTY = {"meta", "br", "input"}


@dataclass
class Node:
    name: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    def all(self, name: str, **wanted: str) -> list[Node]:
        """Descendants by element and attributes; `class_` matches one word of the class."""
        return [n for n in self.walk() if n.name == name and all(_has(n, k, v) for k, v in wanted.items())]

    def one(self, name: str, **wanted: str) -> Node:
        found = self.all(name, **wanted)
        assert len(found) == 1, f"{len(found)} of <{name} {wanted}>"
        return found[0]

    def walk(self) -> Iterator[Node]:
        for child in self.children:
            if isinstance(child, Node):
                yield child
                yield from child.walk()

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)


def _has(node: Node, key: str, value: str) -> bool:
    name = key.rstrip("_").replace("_", "-")
    given = node.attributes.get(name, "")
    return value in given.split() if name == "class" else given == value


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {k: v or "" for k, v in attrs})
        assert len(node.attributes) == len(attrs), f"an attribute twice in <{tag}>"
        self.open[-1].children.append(node)
        if tag not in EMPTY:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> closes <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:40]}")


def parse(page: str) -> Node:
    """The tree of a page whose elements all close where they should."""
    builder = _Builder()
    builder.feed(page)
    builder.close()
    assert builder.open == [builder.root], f"left open: {[n.name for n in builder.open]}"
    return builder.root
