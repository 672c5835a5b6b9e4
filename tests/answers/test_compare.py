from burnish.answers.compare import answers_with, same


def test_spelling_does_not_matter_and_value_does() -> None:
    assert same("+042.0", "42")
    assert same("  two  words ", "two words")
    assert not same("43", "42")
    assert not same(None, "None")
    assert not same("Two", "two")


def test_only_a_marked_answer_is_compared() -> None:
    assert answers_with("30+12=42\n####42", "42")
    assert not answers_with("30+12=42", "42")
    assert not answers_with("####41\n####42", "42")
