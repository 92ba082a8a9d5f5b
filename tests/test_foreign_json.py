import json

import pytest

from twister_jax.foreign_json import is_number, parse


def nested(levels, opening="[", closing="]"):
    return opening * levels + "0" + closing * levels


@pytest.mark.parametrize(
    "value", [0, None, "a", [], {}, [1, {"a": [None, {"b": 2.5}]}], {"a": {}, "b": [[]]}]
)
def test_what_json_says(value):
    assert parse(json.dumps(value)) == value
    assert parse(json.dumps(value).encode()) == value


@pytest.mark.parametrize("opening", ["[", '{"a": ', '[1, {"b": '])
def test_what_is_nested_too_deeply_is_no_json_of_ours(opening):
    """Else whoever walks through it, or prints it, would run out of stack where Python's parser did not."""
    closing = {"[": "]", "{": "}"}
    levels = sum(opening.count(each) for each in closing)
    ending = "".join(closing[each] for each in reversed(opening) if each in closing)
    assert json.dumps(parse(nested(100 // levels, opening, ending)))
    for count in (101, 300, 900, 990, 5_000, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse(nested(count, opening, ending))


@pytest.mark.parametrize("text", ["", "{", "nothing", b"\xff", "1" * 5_000])
def test_what_is_no_json_is_an_error_of_its_value(text):
    with pytest.raises(ValueError, match=r"."):
        parse(text)


def test_a_hook_sees_the_pairs():
    assert parse('{"a": 1, "a": 2}', list) == [("a", 1), ("a", 2)]


@pytest.mark.parametrize("value", [True, "1", None, 10**15, float("nan"), float("inf"), [1]])
def test_numbers(value):
    assert is_number(1)
    assert is_number(-2.5)
    assert not is_number(-2.5, int)
    assert not is_number(value)
