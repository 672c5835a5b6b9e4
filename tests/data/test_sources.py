"""Reading rows: every damaged file is refused with its place, and memory is bounded."""

import contextlib
import json
import os
import threading
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import DataError
from burnish.data import sources
from burnish.data.sources import BadRow, Dropped, read_csv, read_json, read_jsonl, read_rows

GOOD = b'{"a": 1}\n'


@pytest.fixture
def write(tmp_path):
    def write(data, name="f.jsonl"):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        return path

    return write


def rows(path, **options):
    return [located.row for located in read_rows(path, **options)]


def refused(path, match, **options):
    with pytest.raises(DataError, match=match) as caught:
        list(read_rows(path, **options))
    assert caught.value.exit_code == 3
    return caught.value.where.removeprefix(str(path))


def test_rows_come_with_their_line(write):
    path = write(b'{"a": 1}\n\n{"a": 2}\n')
    dropped = Dropped()
    assert [(r.row, r.where) for r in read_rows(path, dropped=dropped)] == [
        ({"a": 1}, f"{path}:1"),
        ({"a": 2}, f"{path}:3"),
    ]
    assert dropped.blank_lines == 1 and dropped.total == 0


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_byte_order_marks_line_ends_and_a_missing_last_one_are_fine(write, mark, end, last):
    data = mark + b'{"a": 1}' + end + b'{"a": 2}' + (end if last else b"")
    assert rows(write(data)) == [{"a": 1}, {"a": 2}]


@settings(deadline=None)
@given(row=st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.lists(st.booleans()), min_size=1))
def test_what_json_writes_is_read_back(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("rows") / "f.jsonl"
    for ascii_only in (True, False):
        path.write_text(json.dumps(row, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
        if any("\0" in text for text in [*row, *(v for v in row.values() if isinstance(v, str))]):
            refused(path, "NUL")
        else:
            assert rows(path) == [row]


@pytest.mark.parametrize("text", ["שלום עולם", "a\u200bb\u202ec", "👩‍👩‍👧", "𠜎𡃁", "\u2028 \u0085"])
def test_right_to_left_zero_width_emoji_and_four_byte_text_survive(write, text):
    assert rows(write(json.dumps({"a": text}, ensure_ascii=False))) == [{"a": text}]
    assert rows(write(json.dumps({"a": text}))) == [{"a": text}]


@pytest.mark.parametrize(
    ("bad", "match", "place"),
    [
        (b'{"a": }', "invalid JSON: Expecting value", ":2:7"),
        (b'{"a": 1} x', "Extra data", ":2:10"),
        (b'{"a": 1,}', "invalid JSON", None),
        (b"{'a': 1}", "double quotes", ":2:2"),
        (b"[1, 2]", "must be an object, this is a list", ":2"),
        (b'"text"', "must be an object, this is text", ":2"),
        (b"null", "must be an object, this is null", ":2"),
        (b"true", "must be an object, this is true or false", ":2"),
        (b"17", "must be an object, this is a number", ":2"),
        (b'{"a": 1, "a": 2}', "'a' is given twice", ":2"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' is given twice", ":2"),
        (b'{"a": NaN}', "NaN is not a JSON number", ":2"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number", ":2"),
        (b'{"a": 1e999}', "1e999 is not a JSON number", ":2"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid JSON: Exceeds", ":2"),
        (b"[" * 100_000, "nested too deeply", ":2"),
        (b'{"a": "x\xffy"}', "byte 0xff at offset 17 is not UTF-8", ":2:9"),
        ('{"ä": "'.encode() + b'\xc3"}', "byte 0xc3 at offset 17 is not UTF-8", ":2:8"),
        (b'{"a": "\xed\xa0\x80"}', "is not UTF-8", ":2:8"),
        (b'{"a": "\\ud800"}', "'a' holds a lone surrogate", ":2"),
        (b'{"a": [{"b": "x\\udc00"}]}', "'a.b' holds a lone surrogate", ":2"),
        (b'{"\\ud800": 1}', "a lone surrogate", ":2"),
        (b'{"a": "x\0"}', "NUL byte at offset 17", ":2:9"),
        (b'{"a": "\\u0000"}', "'a' holds a NUL", ":2"),
    ],
)
def test_a_bad_line_is_refused_with_its_place_or_skipped_and_counted(write, bad, match, place):
    path = write(GOOD + bad + b"\n" + b'{"a": 3}\n')
    where = refused(path, match)
    assert place is None or where == place
    dropped = Dropped()
    assert rows(path, on_bad_row="skip", dropped=dropped) == [{"a": 1}, {"a": 3}]
    assert dropped.total == 1
    assert next(iter(dropped.first.values())).startswith(f"{path}:2")


@pytest.mark.parametrize(
    "data", [b'{"a": 1}\n{"a": "hel', b'{"a": 1}\n{"a"', b'{"a": 1}\n{"a": 1', b'{"a": 1}\n{"a": 1, ']
)
def test_a_last_line_that_is_cut_off_says_so(write, data):
    path = write(data)
    assert refused(path, "ends in the middle of a row").startswith(":2:")
    dropped = Dropped()
    assert rows(path, on_bad_row="skip", dropped=dropped) == [{"a": 1}]
    assert dropped.counts == {"truncated": 1}


@pytest.mark.parametrize("name", ["UTF-16", "UTF-32"])
def test_wide_encodings_are_named_and_cannot_be_skipped(write, name):
    path = write('{"a": 1}\n'.encode(name))
    assert refused(path, f"is {name}", on_bad_row="skip") == ":1:1"


def test_utf16_without_a_mark_is_recognised(write):
    path = write('{"a": 1}\n'.encode("utf-16-le"))
    with pytest.raises(DataError, match="looks like UTF-16"):
        list(read_rows(path))


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\n\n \r\n", b"[]"])
def test_a_file_without_rows_is_an_error(write, data):
    for name in ("f.jsonl", "f.json") if data != b"[]" else ("f.json",):
        refused(write(data, name), "holds .*no row")


def test_a_file_whose_every_row_was_dropped_is_an_error_with_the_reasons(write):
    path = write(b"[1]\n[2]\n{\n")
    refused(path, r"no row is left; dropped: 2 not an object \(first: .*:1\), 1 invalid JSON", on_bad_row="skip")


def test_a_line_over_the_limit_is_refused_and_can_be_skipped(write):
    path = write(GOOD + b'{"a": "' + b"x" * 5000 + b'"}\n' + b'{"a": 3}')
    with pytest.raises(BadRow, match="longer than 1,000 bytes") as caught:
        list(read_jsonl(path, line_limit=1000))
    assert caught.value.where == f"{path}:2:1001"
    dropped = Dropped()
    found = [(r.row, r.where) for r in read_jsonl(path, line_limit=1000, on_bad_row="skip", dropped=dropped)]
    assert found == [({"a": 1}, f"{path}:1"), ({"a": 3}, f"{path}:3")]
    assert dropped.counts == {"line too long": 1}
    exact = write(b'{"a": 1}' + b" " * 991 + b"\n")
    assert len(list(read_jsonl(exact, line_limit=1000))) == 1


def test_a_line_of_a_gigabyte_takes_no_more_memory_than_the_limit(tmp_path):
    path = tmp_path / "f.jsonl"
    with open(path, "wb") as out:
        out.write(b'{"a": 1}\n{"a": "')
        out.truncate(2**30)  # sparse: a gigabyte of NUL without the disk
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="longer than 1,048,576 bytes"):
            list(read_jsonl(path, line_limit=2**20))
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        os.truncate(path, 2**26)  # skipping reads to the end of the line
        tracemalloc.reset_peak()
        assert len(list(read_jsonl(path, line_limit=2**20, on_bad_row="skip"))) == 1
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_reading_is_lazy_and_works_from_a_pipe(tmp_path):
    path = tmp_path / "f.jsonl"
    os.mkfifo(path)
    stop = threading.Event()

    def feed():
        with contextlib.suppress(BrokenPipeError), open(path, "wb") as out:
            while not stop.is_set():
                out.write(GOOD * 1000)

    writer = threading.Thread(target=feed, daemon=True)
    writer.start()
    reader = read_jsonl(path)
    assert [next(reader).row for _ in range(3)] == [{"a": 1}] * 3
    stop.set()
    reader.close()
    writer.join(timeout=10)
    assert not writer.is_alive()


# ---- .json and .csv -------------------------------------------------------------------------------------------------


def test_a_json_list_gives_each_row_its_line(write):
    path = write(b'\xef\xbb\xbf[\n  {"a": 1},\r\n  {"a":\n   2}\n , {"a": 3}]\n', "f.json")
    assert [(r.row["a"], r.where.removeprefix(str(path))) for r in read_json(path)] == [(1, ":2"), (2, ":3"), (3, ":5")]


def test_a_json_file_of_lines_is_read_as_lines(write):
    assert rows(write(b' \n{"a": 1}\n{"a": 2}', "f.json")) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("data", "match", "place"),
    [
        (b'[{"a": 1},\n {"a": }]', "Expecting value", ":2:8"),
        (b'[{"a": 1}\n {"a": 2}]', "expected ',' or ']'", ":2:2"),
        (b'[{"a": 1},]', "Expecting value", ":1:11"),
        (b'[{"a": 1}] x', "extra data", None),
        (b'[{"a": 1},\n{"a": 2}', "middle of a row", ":2:9"),
        (b'[{"a": 1},\n', "middle of a row", ":2:1"),
        (b'[{"a": 1},\n{"b": 1, "b": 2}]', "given twice", ":2"),
        (b"17", "must hold a list", ":1"),
        (b'[{"a": "\xff"}]', "offset 8 is not UTF-8", ":1:9"),
        (b'[{"a": 1},\n{"a": "\xff"}]', "offset 18 is not UTF-8", ":2:8"),
    ],
)
def test_a_broken_json_list_is_refused_with_its_place(write, data, match, place):
    where = refused(write(data, "f.json"), match, on_bad_row="skip")
    assert place is None or where == place


def test_items_of_a_json_list_that_are_no_rows_can_be_skipped(write):
    path = write(b'[{"a": 1},\n 2,\n {"a": "\\ud800"}, {"a": 3}]', "f.json")
    assert refused(path, "this is a number") == ":2"
    dropped = Dropped()
    assert rows(path, on_bad_row="skip", dropped=dropped) == [{"a": 1}, {"a": 3}]
    assert dropped.counts == {"not an object": 1, "lone surrogate": 1}


def test_a_json_list_over_its_limit_is_refused(write, monkeypatch):
    monkeypatch.setattr(sources, "JSON_LIMIT", 10)
    refused(write(b'[{"a": 1}, {"a": 2}]', "f.json"), "held whole")


def test_csv_rows_have_the_line_they_begin_on(write):
    path = write('\ufeffprompt,completion\r\n"a ""b""\r\nc",d\r\n\r\ne,"f,g"\r\n', "f.csv")
    dropped = Dropped()
    found = [(r.row, r.where.removeprefix(str(path))) for r in read_csv(path, dropped=dropped)]
    assert found == [
        ({"prompt": 'a "b"\r\nc', "completion": "d"}, ":2"),
        ({"prompt": "e", "completion": "f,g"}, ":5"),
    ]
    assert dropped.blank_lines == 1


@pytest.mark.parametrize(
    ("data", "match", "place"),
    [
        (b"a,b\n1,2\n1,2,3\n", "3 cells under a header of 2: a, b", ":3"),
        (b"a,b\n1\n", "1 cells under a header of 2", ":2"),
        (b"a,a\n1,2\n", "unique, non-empty names", ":1"),
        (b"a,\n1,2\n", "unique, non-empty names", ":1"),
        (b'a,b\n1,"2\n3', "invalid CSV: unexpected end of data", ":2"),
        (b'a,b\n1,"2"x\n', "invalid CSV", ":2"),
        (b"a,b\n1,\xff\n", "not UTF-8", ":2:3"),
        (b"a\n" + b"x" * 200_000 + b"\n", "field larger than field limit(.|\n)*JSON Lines", ":2"),
        (b"a,b\n", "holds no rows", ""),
        (b"", "holds no rows", ""),
    ],
)
def test_a_bad_csv_is_refused_with_its_place(write, data, match, place):
    assert refused(write(data, "f.csv"), match) == place


def test_csv_rows_of_another_width_can_be_skipped(write):
    path, dropped = write(b"a,b\n1,2\n3\n4,5\n", "f.csv"), Dropped()
    assert [row["a"] for row in rows(path, on_bad_row="skip", dropped=dropped)] == ["1", "4"]
    assert dropped.counts == {"wrong number of cells": 1}


# ---- files that are not there, or of another kind -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f.parquet", "f.arrow", "f.jsonl.gz", "f.txt", "f", "f.pkl", "f.npy"])
def test_other_kinds_are_refused_with_what_to_do(write, name):
    with pytest.raises(DataError, match=r"accepted are \.jsonl, \.ndjson, \.json, \.csv") as caught:
        list(read_rows(write(b"PAR1", name)))
    assert caught.value.remedy
    if name == "f.parquet":
        assert "read_parquet" in caught.value.remedy


def test_a_missing_file_suggests_its_neighbour(write):
    path = write(GOOD, "train.jsonl")
    with pytest.raises(DataError, match=r"no such file(.|\n)*did you mean .*train\.jsonl"):
        list(read_rows(path.with_name("trian.jsonl")))
    with pytest.raises(DataError, match="is a folder"):
        list(read_jsonl(path.parent))


def test_reasons_are_listed_most_frequent_first():
    dropped = Dropped()
    for place in range(3):
        dropped.add("too long", f"f:{place}")
    dropped.add("empty", "f:9")
    assert str(dropped) == "3 too long (first: f:0), 1 empty (first: f:9)"
    assert str(Dropped()) == "none"
