"""Rows to examples: every published shape is recognised, and what is not is refused with what was found."""

import hashlib
import json

import pytest

from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Message
from burnish.data.formats import Parser, load
from burnish.data.sources import BadRow, Located

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
TOOL = {"role": "tool", "content": ""}
S, U, A, T = Message("system", "be brief"), Message("user", "2+2?"), Message("assistant", "4"), Message("tool", "")


def parse(row, **options):
    return Parser(**options)(Located(row, "f.jsonl:3"))


def refused(row, match, where=None, **options):
    with pytest.raises(DataError, match=match) as caught:
        parse(row, **options)
    assert caught.value.where.startswith("f.jsonl:3")
    if where is not None:
        assert caught.value.where == f"f.jsonl:3  {where}"
    return caught.value


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "f.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


# ---- recognised -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "format", "conversational", "prompt", "completion"),
    [
        ({"messages": [USER, ANSWER]}, "messages", True, (U,), (A,)),
        ({"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}, "messages", True, (S, U, A, U), (A,)),
        ({"messages": [USER, ANSWER, TOOL, TOOL, ANSWER]}, "messages", True, (U, A, T, T), (A,)),
        ({"prompt": "2+2?", "completion": "4"}, "prompt_completion", False, (U,), (A,)),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, "prompt_completion", True, (S, U), (A,)),
        (
            {"prompt": [USER], "completion": [ANSWER, TOOL, ANSWER]},
            "prompt_completion",
            True,
            (U,),
            (A, T, A),
        ),
        ({"instruction": "2+2?", "output": "4"}, "alpaca", True, (U,), (A,)),
        ({"instruction": "2+2?", "input": "", "output": "4", "text": "all"}, "alpaca", True, (U,), (A,)),
        (
            {"instruction": "add", "input": "2+2", "output": "4"},
            "alpaca",
            True,
            (Message("user", "add\n2+2"),),
            (A,),
        ),
        (
            {"instruction": "2+2?", "output": "4", "system": "be brief", "history": [["2+2?", "4"]]},
            "alpaca",
            True,
            (S, U, A, U),
            (A,),
        ),
        (
            {
                "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
                "system": "be brief",
            },
            "sharegpt",
            True,
            (S, U),
            (A,),
        ),
        (
            {"conversations": [{"from": k, "value": v} for k, v in [("user", "2+2?"), ("chatgpt", "4")]]},
            "sharegpt",
            True,
            (U,),
            (A,),
        ),
        ({"prompt": "2+2?", "completion": "4", "messages": None, "label": 3}, "prompt_completion", False, (U,), (A,)),
        ({"messages": [USER, ANSWER], "prompt": "x", "prompt_id": "y"}, "messages", True, (U,), (A,)),
    ],
)
def test_shapes_are_recognised(row, format, conversational, prompt, completion):
    parser = Parser()
    example = parser(Located(row, "f.jsonl:3"))
    assert (parser.format.name, parser.conversational) == (format, conversational)
    assert (example.prompt, example.completion, example.text) == (prompt, completion, None)
    assert example.where == "f.jsonl:3"


def test_text_rows():
    example = parse({"text": " kept as it is\n", "source": "web"})
    assert (example.text, example.prompt, example.completion) == (" kept as it is\n", (), ())
    assert example.columns == {"source": "web"}


def test_other_columns_travel_with_the_example():
    row = {"prompt": "2+2?", "completion": "4", "level": 4, "tests": ["a"], "gold": None}
    assert parse(row).columns == {"level": 4, "tests": ["a"], "gold": None}


def test_contents_are_kept_to_the_letter():
    text = "  a\u200b\n\t é 漢 "
    example = parse({"prompt": text, "completion": text})
    assert example.prompt[0].content == example.completion[0].content == text


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    assert parse({"messages": [{"role": "user", "content": parts}, ANSWER]}).prompt == (U,)
    image = [{"type": "image", "url": "x"}]
    refused({"messages": [{"role": "user", "content": image}, ANSWER]}, "list of text parts", "messages[0].content")


@pytest.mark.parametrize("key", ["train", "training", "loss"])
@pytest.mark.parametrize("value", [True, False])
def test_flags_of_a_turn(key, value):
    flagged = {**ANSWER, key: value}
    assert parse({"messages": [USER, flagged, USER, ANSWER]}).prompt[1].train is value
    assert parse({"messages": [USER, {**ANSWER, key: None}]}).completion[0].train is None


def test_weights_of_a_turn_are_zero_or_one():
    assert parse({"messages": [USER, {**ANSWER, "weight": 0}]}).completion[0].train is False
    assert parse({"messages": [USER, {**ANSWER, "weight": 1}]}).completion[0].train is True
    refused({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "true or false", "messages[1].weight")
    refused({"messages": [USER, {**ANSWER, "train": "false"}]}, "true or false", "messages[1].train")
    refused({"messages": [USER, {**ANSWER, "train": True, "weight": 0}]}, "contradict", "messages[1]")


# ---- the columns mapping --------------------------------------------------------------------------------------------


def test_a_mapping_says_which_column_is_which():
    row = {"question": "2+2?", "answer": "4", "text": "not this", "level": 2}
    example = parse(row, columns={"prompt": "question", "completion": "answer"})
    assert (example.prompt, example.completion) == ((U,), (A,))
    assert example.columns == {"text": "not this", "level": 2}


def test_a_mapping_may_name_some_parts_only():
    example = parse({"question": "2+2?", "completion": "4", "prompt": "old"}, columns={"prompt": "question"})
    assert (example.prompt, example.completion) == ((U,), (A,))
    assert example.columns == {"prompt": "old"}


def test_a_mapping_turns_refused_rows_into_usable_ones():
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    assert parse(row, columns={"prompt": "prompt", "completion": "chosen"}).completion == (A,)
    row = {"prompt": "2+2?", "completion": "4", "label": True}
    assert parse(row, columns={"prompt": "prompt", "completion": "completion"}).completion == (A,)
    row = {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "5"}]}
    assert parse(row, columns={"messages": "chosen"}).completion == (A,)


def test_mistakes_in_a_mapping():
    with pytest.raises(ConfigError, match="Did you mean 'completion'"):
        Parser(columns={"complettion": "answer"})
    with pytest.raises(ConfigError, match="given two parts"):
        Parser(columns={"prompt": "a", "completion": "a"})
    with pytest.raises(ConfigError, match="no format has all of"):
        Parser(columns={"prompt": "a", "text": "b"})
    refused({"question": "2+2?"}, "'answer', mapped to 'completion', is missing", columns={"completion": "answer"})
    refused({"questoin": "a"}, "Did you mean 'questoin'", columns={"prompt": "question"})
    refused({"question": None, "a": 1}, "is null", columns={"prompt": "question"})


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "name", "instead"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", "dpo"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "preference", "messages: chosen"),
        ({"prompt": "a", "completion": "b", "label": False}, "unpaired", "kto"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "stepwise", "prm"),
    ],
)
def test_rows_for_other_methods_are_recognised_and_say_what_learns_from_them(row, name, instead):
    error = refused(row, f"{name} format.*supervised tuning cannot")
    assert instead in error.remedy and not isinstance(error, BadRow)  # no policy may skip these


def test_prompts_alone_are_refused_where_something_is_to_be_learned():
    refused({"prompt": "2+2?", "answer": "4"}, "nothing to learn")
    example = parse({"prompt": "2+2?", "answer": "4"}, need="prompt")
    assert (example.prompt, example.completion, example.columns) == ((U,), (), {"answer": "4"})
    assert parse({"prompt": [SYSTEM, USER]}, need="prompt").prompt == (S, U)
    assert parse({"messages": [SYSTEM, USER]}, need="prompt").prompt == (S, U)
    refused({"prompt": [USER, ANSWER]}, "ends with the turn to be answered", need="prompt")
    refused({"text": "a"}, "prompts are needed", need="prompt")


def test_unknown_columns_show_what_was_found_and_what_is_accepted():
    error = refused(
        {"question": "a", "answer": "b", "id": 3}, "columns found: question, answer, id; accepted: messages"
    )
    assert "prompt + completion (prompt_completion)" in error.message
    assert error.remedy == "say which is which: columns: {prompt: question, completion: answer}"
    assert "(null: prompt, x)" in refused({"prompt": None, "x": None}, "columns found").message
    assert "messages: dialogue" in refused({"dialogue": []}, "columns found").remedy
    refused({}, "columns found: none")


@pytest.mark.parametrize(
    ("messages", "match", "where"),
    [
        ([], "holds no message", "messages"),
        ("text", "must be a list of messages, this is text", "messages"),
        ([USER, "4"], "must be an object, this is text", "messages[1]"),
        ([USER, {"role": "assistant"}], "content missing or null; found: role", "messages[1]"),
        ([USER, {"role": "assistant", "content": None}], "content missing or null", "messages[1]"),
        ([{"from": "human", "value": "x"}], "role and content missing", "messages[0]"),
        ([USER, {"role": "asistant", "content": "4"}], "Did you mean 'assistant'", "messages[1].role"),
        ([USER, {"role": 3, "content": "4"}], "3 is no role", "messages[1].role"),
        ([USER, {"role": "assistant", "content": 4}], "this is a number", "messages[1].content"),
        ([USER, {"role": "assistant", "content": " \n"}], "assistant turn is empty or only", "messages[1].content"),
        ([{"role": "user", "content": ""}, ANSWER], "user turn is empty", "messages[0].content"),
        ([USER, {**ANSWER, "tool_calls": [{"name": "f"}]}], "'tool_calls' cannot be shown", "messages[1].tool_calls"),
        ([USER, {**ANSWER, "reasoning_content": "hm"}], "cannot be shown", "messages[1].reasoning_content"),
    ],
)
def test_bad_messages_are_refused_with_their_place(messages, match, where):
    refused({"messages": messages}, match, where)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([ANSWER, USER], r"turn 0 \(assistant\) begins"),
        ([USER, USER, ANSWER], r"turn 1 \(user\) follows user.*a user turn comes after the beginning or assistant"),
        ([USER, ANSWER, ANSWER], r"turn 2 \(assistant\) follows assistant"),
        ([USER, SYSTEM, ANSWER], "turn 1 is a system turn; only the first may be"),
        ([SYSTEM, SYSTEM, USER, ANSWER], "turn 1 is a system turn"),
        ([SYSTEM, ANSWER], r"turn 1 \(assistant\) begins"),
        ([USER, TOOL, ANSWER], r"turn 1 \(tool\) follows user"),
        ([SYSTEM], "only a system turn"),
        ([USER, ANSWER, USER], "ends with a user turn: nothing answers it"),
    ],
)
def test_wrong_orders_of_roles_are_refused(messages, match):
    refused({"messages": messages}, match)


def test_orders_are_checked_over_prompt_and_completion_together():
    refused({"prompt": [USER, ANSWER], "completion": [ANSWER]}, "follows assistant")
    refused({"prompt": [USER], "completion": [USER]}, "follows user")
    refused({"prompt": [USER], "completion": [ANSWER, USER]}, "ends with an assistant turn")
    refused({"prompt": [USER, ANSWER], "completion": [USER, ANSWER]}, "ends with the turn to be answered")


@pytest.mark.parametrize(
    ("row", "match", "where"),
    [
        ({"prompt": "a", "completion": ""}, "empty or only whitespace", "completion"),
        ({"prompt": "a", "completion": " \n\t"}, "empty or only whitespace", "completion"),
        ({"prompt": " ", "completion": "b"}, "empty or only whitespace", "prompt"),
        ({"prompt": 3, "completion": "b"}, "must be text, this is a number", "prompt"),
        ({"prompt": "a", "completion": {"x": 1}}, "must be text, this is an object", "completion"),
        ({"prompt": "a", "completion": [ANSWER]}, "must be a list of messages, this is text", "prompt"),
        ({"text": "\n"}, "empty or only whitespace", "text"),
        ({"instruction": "a", "output": ""}, "empty or only whitespace", "output"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "list of .user, assistant. pairs", "history"),
        ({"instruction": "a", "output": "b", "history": [["x", ""]]}, "empty or only", "history[0][1]"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "'bing' is no role", "conversations[0].from"),
        ({"conversations": [USER, ANSWER]}, "from and value missing", "conversations[0]"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "cannot be shown to the model yet", "tools"),
    ],
)
def test_empty_and_wrong_values_are_refused_with_their_place(row, match, where):
    refused(row, match, where)


def test_a_system_turn_and_a_tool_result_may_be_empty():
    empty = {"role": "system", "content": ""}
    assert len(parse({"messages": [empty, USER, ANSWER, TOOL, ANSWER]}).prompt) == 4
    assert parse({"messages": [USER, ANSWER], "tools": []}).columns == {"tools": []}


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_is_read_with_its_format_and_fingerprint(write):
    path = write({"prompt": "2+2?", "completion": "4"}, {"prompt": "2+2?", "completion": "4"})
    data = load(path)
    assert (data.format, data.conversational, data.rows, len(data.examples)) == ("prompt_completion", False, 2, 2)
    assert [e.where for e in data.examples] == [f"{path}:1", f"{path}:2"]
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(load(path, limit=1).examples) == 1


def test_one_format_a_file_and_the_first_other_row_is_named(write):
    row, other = {"prompt": "2+2?", "completion": "4"}, {"messages": [USER, ANSWER]}
    path = write(row, row, other, row)
    with pytest.raises(DataError, match="this row is messages; the rows before are prompt_completion") as caught:
        load(path)
    assert caught.value.where == f"{path}:3"
    data = load(path, on_bad_row="skip")
    assert len(data.examples) == 3 and data.rows == 4
    assert data.dropped.counts == {"another format": 1} and data.dropped.first == {"another format": f"{path}:3"}
    lists = {"prompt": [USER], "completion": [ANSWER]}
    with pytest.raises(
        DataError, match=r"prompt_completion \(message lists\); the rows before are prompt_completion\n"
    ):
        load(write(row, lists))
    with pytest.raises(DataError, match="the rows before are messages, this one is not"):
        load(write(other, {"x": 1}))


def test_bad_rows_are_skipped_and_counted_by_reason(write):
    good = {"messages": [USER, ANSWER]}
    path = write(good, {"messages": []}, {"messages": [USER, USER]}, [1], {"messages": []}, good)
    data = load(path, on_bad_row="skip")
    assert len(data.examples) == 2
    assert data.dropped.counts == {"empty messages": 2, "wrong role order": 1, "not an object": 1}
    assert data.rows == 6


def test_no_row_left_is_an_error_with_the_reasons(write):
    with pytest.raises(DataError, match="no row is left; dropped: 2 empty messages") as caught:
        load(write({"messages": []}, {"messages": []}), on_bad_row="skip")
    assert caught.value.exit_code == 3


def test_rows_for_another_method_cannot_be_skipped(write):
    with pytest.raises(DataError, match="preference"):
        load(write({"prompt": "a", "chosen": "b", "rejected": "c"}), on_bad_row="skip")


def test_message_keys_that_are_not_used_are_counted(write):
    named = {**USER, "name": "bob", "id": None}
    data = load(write({"messages": [named, ANSWER]}, {"messages": [named, ANSWER]}))
    assert data.notices == {"message key 'name' is not used": 2}
