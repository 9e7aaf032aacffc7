"""Small files that are read with suspicion: what is right is read, all else is one sentence."""

import json
import os

import pytest

from miniconvit import UserError
from miniconvit.system import MOST_JSON_DEPTH, MOST_TEXT_BYTES, parse_json, read_json, read_text

RIGHT = [
    {},
    {"a": [1, -2, 2**63 - 1, 0.1, 1e-300, True, None, "ü", "\udcff", {"b": []}]},
    {"a" * 1000: "b" * 1000},
    {"path": os.fsdecode(b"M\xfcller")},
]


@pytest.mark.parametrize("value", RIGHT)
def test_what_json_writes_is_read(tmp_path, value):
    text = json.dumps(value)
    (tmp_path / "a.json").write_text(text)
    for found in (parse_json(text), parse_json(text.encode()), read_json(tmp_path / "a.json", "")):
        assert found == value
    assert parse_json("[1]", list) == [1] == parse_json("[1]", object)


def nested(depth):
    return '{"a":' * depth + "1" + "}" * depth


WRONG = {
    "": "Expecting value",
    "{": "Expecting property name",
    "{} {}": "Extra data",
    "[1]": "holds no JSON object",
    "null": "holds no JSON object",
    "NaN": "NaN is not finite",
    '{"a": NaN}': "NaN is not finite",
    '{"a": -Infinity}': "-Infinity is not finite",
    '{"a": 1e999}': "1e999 is not finite",
    '{"a": 9223372036854775808}': "no integer of 64 bits",
    '{"a": ' + "9" * 10_000 + "}": "no integer of 64 bits",
    '{"a": 1, "a": 2}': "a key comes twice",
    '{"a": [{"b": 1, "b": 1}]}': "a key comes twice",
    '{"a": "\\u0000"}': "zero byte",
    '{"\\u0000": 1}': "zero byte",
    '{"a": "\\ud800"}': "surrogates not allowed",
    '{"\\ud800": 1}': "surrogates not allowed",
    nested(MOST_JSON_DEPTH): "nested too deeply",
    nested(900): "nested too deeply",
    nested(100_000): "nested too deeply",
    "[" * 1_000_000: "nested too deeply",
    '{"a": "' + "b" * MOST_TEXT_BYTES + '"}': "more than 4,194,304 bytes",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:30])
def test_what_no_program_of_ours_writes_is_one_sentence(tmp_path, text):
    with pytest.raises(ValueError, match=WRONG[text]):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json cannot be read \(.*{WRONG[text]}.*\): repair"):
        read_json(tmp_path / "a.json", "repair it")


def test_the_deepest_that_is_read():
    assert parse_json(nested(MOST_JSON_DEPTH - 1))


def test_a_missing_file_is_none_and_what_is_no_file_a_sentence(tmp_path):
    assert read_json(tmp_path / "none.json", "") is None is read_text(tmp_path / "none", "")
    (tmp_path / "file").write_text("x")
    assert read_text(tmp_path / "file" / "below", "") is None
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff")
    words = {"pipe": "it is no file", "folder": "it is no file", "bytes": "can't decode byte"}
    words["long" * 100] = "File name too long"
    for name, reason in words.items():
        for read in (read_text, read_json):
            with pytest.raises(UserError, match=rf"{name} cannot be read \(.*{reason}.*\): look"):
                read(tmp_path / name, "look there")
