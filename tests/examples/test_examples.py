"""Every example runs as its docstring says, on a tiny bundle."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from medusa_runtime import Engine, SamplingParams

FOLDER = Path(__file__).parents[2] / "examples"
SECONDS = 120


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine.load(tiny_bundle)


def start(name: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)


def run(name: str, *arguments: object) -> str:
    found = start(name, *arguments)
    assert (found.returncode, found.stderr) == (0, b"")
    return found.stdout.decode()


def test_all_examples_are_tested() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {
        "embed.py",
        "asyncio_service.py",
        "batch_file.py",
        "extract_json.py",
    }


@pytest.mark.parametrize(
    ("name", "words"), [("embed.py", "BUNDLE"), ("batch_file.py", "BUNDLE PROMPTS.jsonl")], ids=["embed", "batch_file"]
)
def test_wrong_arguments_show_the_usage(name: str, words: str) -> None:
    for arguments in ([], ["a", "b", "c"]):
        found = start(name, *arguments)
        assert (found.returncode, found.stdout) == (1, b"")
        assert found.stderr.decode() == f"usage: python {FOLDER / name} {words}\n"


def test_embedding_takes_fifteen_lines(tiny_bundle: Path, engine: Engine) -> None:
    printed = run("embed.py", tiny_bundle)
    assert printed.startswith(engine.generate("What is a hash table?", SamplingParams(max_tokens=48)).text)
    drawn = engine.generate("Name three colours.", SamplingParams(max_tokens=48, temperature=0.7, seed=1))
    assert printed.endswith(f"{drawn.text}\n")
    code = (FOLDER / "embed.py").read_text("utf-8").split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_facts_are_extracted_as_json(tiny_bundle: Path) -> None:
    assert start("extract_json.py", tiny_bundle).stderr.decode().endswith("BUNDLE TEXT …\n")
    printed = run("extract_json.py", tiny_bundle, "one two", "three four").splitlines()
    kinds = [line for line in printed if line.startswith(("work ", "leisure "))]
    known = [int(line.split()[1]) for line in kinds]
    assert len(kinds) == 2 and min(known) > 10  # of the first question's tokens
    assert "ngram-" in printed[-1]


def test_a_file_of_prompts(tiny_bundle: Path, engine: Engine, tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(20)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), "utf-8")
    answers = [json.loads(line) for line in run("batch_file.py", tiny_bundle, file).splitlines()]
    expected = [engine.generate(prompt, SamplingParams(max_tokens=64)) for prompt in prompts]
    assert [answer["text"] for answer in answers] == [result.text for result in expected]
    assert [answer["finish_reason"] for answer in answers] == [result.finish_reason for result in expected]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "Hi"}', 'expected a JSON object with a prompt: {"prompt": "…"}'),
        ("5", "expected a JSON object with a prompt"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ('{"prompt": ""}', "the prompt is empty"),
        ("\udcff", "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_bad_line_is_named_behind_earlier_answers(tiny_bundle: Path, tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "prompts.jsonl"
    good = json.dumps({"prompt": "Hi"})
    file.write_text(f"{good}\n{good}\n{line}\n{good}\n", "utf-8", "surrogateescape")
    found = start("batch_file.py", tiny_bundle, file)
    assert (found.returncode, found.stdout.count(b"\n")) == (1, 2)
    error = found.stderr.decode()
    assert error.startswith(f"{file}:3: ") and reason in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def port(tiny_bundle: Path) -> Iterator[int]:
    command = [sys.executable, str(FOLDER / "asyncio_service.py"), str(tiny_bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        assert line.startswith("listening on port "), process.communicate(timeout=SECONDS)
        yield int(line.split()[-1])
        process.terminate()
        assert process.communicate(timeout=SECONDS)[1] == b""


def ask(port: int, request: bytes) -> list[Any]:
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        connection.sendall(request + b"\n")
        return [json.loads(line) for line in connection.makefile("rb")]


def test_a_service_streams_answers(port: int, engine: Engine) -> None:
    lines = ask(port, json.dumps({"prompt": "Hello there", "params": {"max_tokens": 30}}).encode())
    expected = engine.generate("Hello there", SamplingParams(max_tokens=30), sanitize=True)
    assert "".join(line["text"] for line in lines[:-1]) == expected.text
    assert [line["finish_reason"] for line in lines[:-1]][-1] == expected.finish_reason
    assert lines[-1]["completion_tokens"] == len(expected.token_ids)


def test_a_service_outlives_bad_requests_and_clients_that_leave(port: int, tiny_bundle: Path) -> None:
    endless = json.dumps({"prompt": "Hello", "params": {"max_tokens": 400, "ignore_eos": True}}).encode() + b"\n"
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
            connection.sendall(endless)
            connection.recv(1)
    deep = b"[" * 900 + b"]" * 900
    for request in (
        b"", b"[]", b"{}", b"\xff", b"5", b'"text"', b"[" * 100_000, b"1" * 5000, b'{"prompt": 3}', b'{"prompt": {}}',
        b'{"prompt": ""}', b'{"prompt": []}', b'{"prompt": "\\ud800"}', b'{"prompt": %s}' % deep, b'{"prompt": [{}]}',
        b'{"prompt": "a", "params": 5}', b'{"prompt": "a", "params": %s}' % deep,
        b'{"prompt": "a", "params": {"n": {}}}',
        b'{"prompt": "a", "params": {"stop": %s}}' % deep, b'{"prompt": "a", "params": {"best_of": 2}}',
        b'{"prompt": "a", "params": {"profile": "oak"}}', b'{"prompt": 3, "params": {"truncate_prompt_tokens": 2}}',
        b'{"prompt": {"a": 1}, "params": {"truncate_prompt_tokens": 2}}', b'{"prompt": "%s"}' % (b"x" * (1 << 19)),
    ):  # fmt: skip
        (line,) = ask(port, request)
        assert line["error"]["type"] == "invalid_request_error", request[:80]
        assert str(tiny_bundle) not in str(line)
    assert ask(port, b'{"prompt": "Hi", "params": {"max_tokens": 2}}')[-1]["completion_tokens"] == 2
