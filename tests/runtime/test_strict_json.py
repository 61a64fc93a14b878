"""What is wrong with JSON is said in words: where it is, and nothing of the text itself."""

import json

import pytest
from medusa_runtime.errors import BundleError
from medusa_runtime.strict_json import parse_json


def fault(data):
    with pytest.raises(BundleError) as caught:
        parse_json("the file", data, 200_000)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "expected value at column 1"),
        (b"{", "expected property name enclosed in double quotes at column 2"),
        (b'{"a" 1}', "expected ':' delimiter at column 6"),
        (b"[1 2]", "expected ',' delimiter at column 4"),
        (b'["ab', "unterminated string at column 2"),
        (b'["a\tb"]', "invalid control character at column 4"),
        (b'["\\x"]', "invalid \\escape at column 3"),
        (b"1 2", "extra data at column 3"),
        (b"1 2\n", "extra data at column 3"),
        (b"\xef\xbb\xbf{}", "unexpected UTF-8 BOM at column 1"),
        (b'{\n "a": ?\n}', "expected value at line 2, column 7"),
        (b'{"password": "secret \xff"}', "byte 22 is not UTF-8"),
        (b"[" * 100_000, "too many lists and objects are inside one another"),
        (b"1" * 5000, "a number has too many digits"),
        (b'{"a": 1, "a": 2}', "an object has the same key twice"),
        (b"[NaN]", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
    ],
)
def test_faults(data, reason) -> None:
    assert fault(data) == f"the file is not valid JSON: {reason}"


def test_too_many_bytes() -> None:
    assert fault(b" " * 200_001) == "the file has more than 200000 bytes"


def test_values() -> None:
    value = {"a": [1, 2.5, None, True, "Grüße"]}
    assert parse_json("the file", json.dumps(value).encode(), 1000) == value
