"""Text stays text: whatever a model, a file or a recipe says."""

import pytest

from burnish.report.markup import Markup, join, tag, text, visible
from tests.report.page import parse

HOSTILE = [
    "<script>alert(1)</script>", "</title></style></script><img src=x onerror=alert(1)>", "\" onmouseover=\"alert(1)", "' x='`", "&lt;b&gt; &amp;",
    "<!-- -->", "]]>", "{{7*7}}${7*7}", "=cmd()", "javascript:alert(1)", "\x1b[31mred\x1b[0m", "a\0b", "\u202egnp.exe\u202c", "\u2066x\u2069",
    "\ud800 alone", "\U000e0041\U000e0042", "\ufeffz\u200b", "\u2028\u2029", "emoji 😀 👩‍👩‍👧 stays", "é 漢字 עברית العربية", "a\r\nb\tc",
]  # fmt: skip


@pytest.mark.parametrize("words", HOSTILE)
def test_text_reads_back_as_written_and_makes_no_element(words: str) -> None:
    tree = parse(tag("p", words, title=words))
    p = tree.one("p")
    assert p.text == visible(words) and p.attributes["title"] == visible(words)
    assert {n.name for n in p.walk()} <= {"span"} and all(n.attributes == {"class": "hidden-character"} for n in p.walk())
    p.text.encode("utf-8")


def test_hidden_characters_are_spelled_out_and_the_rest_is_kept() -> None:
    assert visible("a\0b\x1b[31m\u202ec\ud800\U000e0041") == "a\\x00b\\x1b[31m\\u202ec\\ud800\\U000e0041"
    kept = "😀 👩‍👩‍👧 é 漢字 עברית\n\tx"
    assert visible(kept) == kept


def test_only_markup_is_written_as_it_stands() -> None:
    assert tag("p", Markup("<b>x</b>"), "<b>") == "<p><b>x</b>&lt;b&gt;</p>"
    assert join("<", None, ["a", [tag("br")]], 3) == "&lt;a<br>3"
    assert isinstance(text("x") + "<", str) and not isinstance(text("x") + "<", Markup)


def test_where_an_element_would_break_the_page_hidden_characters_are_plain() -> None:
    for name in ("title", "text", "option"):
        assert tag(name, "a\0<b>") == f"<{name}>a\\x00&lt;b&gt;</{name}>"


@pytest.mark.parametrize("attributes", [{"onclick": "x"}, {"src": "x"}, {"style": "x"}, {"href": "https://x"}, {"href": "javascript:x"}, {"a b": "x"}])
def test_attributes_that_run_or_load_are_refused(attributes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"place in a report|its own parts"):
        tag("a", "x", **attributes)
    with pytest.raises(ValueError, match="element"):
        tag("p onclick=x", "x")
