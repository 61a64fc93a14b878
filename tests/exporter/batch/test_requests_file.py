"""A file of requests is checked as a whole, before any work."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.batch import requests_file
from medusa_exporter.batch.requests_file import BatchError, check_requests, read_requests

from .batches import chat, completion, write

GOOD = chat("a", "Hi")
DEPTHS = range(700, 1000, 10)  # some of them can be parsed, but not shown


def test_requests_are_read_in_order_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    second = json.dumps(completion("b", "\u2028 Grüße"), ensure_ascii=False)
    file.write_text(f"\ufeff{json.dumps(GOOD)}\r\n\n  \n {second} ", encoding="utf-8")
    found = list(read_requests(file))
    assert [(one.line, one.custom_id, one.url) for one in found] == [
        (1, "a", "/v1/chat/completions"),
        (4, "b", "/v1/completions"),
    ]
    assert found[0].body == GOOD["body"]
    assert found[0].data == json.dumps(GOOD).encode()
    assert found[1].body["prompt"] == "\u2028 Grüße"
    facts = check_requests(file)
    assert (facts.requests, facts.first_chat_line) == (2, 1)
    assert check_requests(write(file, [completion("c", "x")])).first_chat_line is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not valid JSON: expected property name enclosed in double quotes at column 2; expected one JSON"),
        ("[1]", r"the line is \[1\]; expected a JSON object with custom_id, method, url and body"),
        ('{"a": 1, "a": 2}', "same key twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ("[" * 100_000, "is not valid JSON: too many lists and objects are inside one another"),
        *((f'{{"custom_id": {"[" * depth}1{"]" * depth}}}', "custom_id is|inside one another") for depth in DEPTHS),
        (GOOD | {"custom_id": 5}, "custom_id is 5; expected a text"),
        (GOOD | {"custom_id": ""}, "custom_id is ''; expected a text"),
        (GOOD | {"custom_id": "\ud800"}, "custom_id is .*; expected a text"),
        (GOOD | {"method": "GET"}, "method is 'GET'; expected 'POST'"),
        ({name: value for name, value in GOOD.items() if name != "method"}, "method is None; expected 'POST'"),
        (GOOD | {"url": "/v1/embeddings"}, "url is '/v1/embeddings'; expected '/v1/chat/completions' or"),
        (GOOD | {"url": ["/v1/completions"]}, "url is .*; expected"),
        (GOOD | {"body": "Hi"}, "body is 'Hi'; expected a JSON object"),
        (chat("first", "again"), "the custom_id is that of line 1; expected one that no other line has"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, reason: str) -> None:
    file = write(tmp_path / "in.jsonl", [chat("first", "Hi"), chat("second", "Hi")])
    text = line if isinstance(line, str) else json.dumps(line)
    with file.open("a") as opened:
        opened.write(f"\n{text}\n{json.dumps(chat('last', 'Hi'))}\n")
    with pytest.raises(BatchError, match=rf"in\.jsonl:4:? .*{reason}"):
        check_requests(file)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"custom_id": "secret \xff"}\n')
    with pytest.raises(BatchError, match=r"in\.jsonl:1 is not valid JSON: byte 23 is not UTF-8; expected") as caught:
        check_requests(tmp_path / "in.jsonl")
    assert "secret" not in str(caught.value)


def test_the_first_repeated_id_of_many_is_named(tmp_path: Path) -> None:
    names = [*"abcdefgh", "c", "a", "h", "c"]
    file = write(tmp_path / "in.jsonl", [chat(name, "Hi") for name in names])
    with pytest.raises(BatchError, match=r"in\.jsonl:9: the custom_id is that of line 3"):
        check_requests(file)


def test_files_without_requests_are_refused(tmp_path: Path) -> None:
    for content in ("", "\n \n"):
        (tmp_path / "in.jsonl").write_text(content)
        with pytest.raises(BatchError, match=r"holds no requests; .* with custom_id, method, url and body$"):
            check_requests(tmp_path / "in.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BatchError, match="is not a regular file; expected one, because it is read more than once"):
        check_requests(tmp_path / "pipe")


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_file, "MAX_LINE", 1000)
    file = write(tmp_path / "in.jsonl", [chat("a", "Hi"), chat("b", "x" * 1000)])
    with pytest.raises(BatchError, match=r"in\.jsonl:2: the line has more than 1000 bytes"):
        check_requests(file)


def test_long_files_are_not_kept_in_memory(tmp_path: Path) -> None:
    count = 20_000
    file = write(tmp_path / "in.jsonl", (chat(f"{number} {'x' * 100}", "y" * 300) for number in range(count)))
    assert file.stat().st_size > 500 * count
    tracemalloc.start()
    try:
        assert check_requests(file).requests == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150 * count
