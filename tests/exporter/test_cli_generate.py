"""`medusa-export generate`: what is printed, what is written as JSON, and what is passed to the engine."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.cli.answers import describe_comparison
from medusa_exporter.cli.exit_codes import ExitCode
from medusa_runtime import Engine, GenerationResult, SamplingParams
from medusa_runtime.results import Choice, Times

from .bench.in_process import run

FAST = ("--threads", 1)


def generate(*arguments: object) -> int:
    return run("generate", *arguments, *FAST)


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine.load(tiny_bundle, threads=1)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, SamplingParams, dict[str, Any]]]:
    """What the engine is asked for."""
    kept: list[Any] = []
    submit = Engine.submit

    def recorded(self: Engine, prompt: Any, params: SamplingParams, **options: Any) -> Any:
        kept.append((prompt, params, options))
        return submit(self, prompt, params, **options)

    monkeypatch.setattr(Engine, "submit", recorded)
    return kept


def test_the_answer_is_printed_and_figures_are_apart(
    tiny_bundle: Path, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny_bundle, "What is a tree?", "--max-tokens", 30, "--profile", "tree-4") == 0
    shown = capsys.readouterr()
    expected = engine.generate("What is a tree?", SamplingParams(max_tokens=30))
    assert shown.out == f"{expected.text}\n"
    figures = r"\[tree-4\] \d+ tokens, \d+ steps, \d\.\d\d tokens/step, [\d.]+ tokens/s; prompt of \d+ tokens in \d"
    assert re.match(figures, shown.err)


def test_the_json_has_the_whole_result(
    tiny_bundle: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    options = ["--max-tokens", 12, "--n", 2, "--temperature", 0.9, "--seed", 4, "--logprobs", 2]
    assert generate(tiny_bundle, "Hi", *options, "--profile", "tree-8", "--json", file) == 0
    params = SamplingParams(max_tokens=12, n=2, temperature=0.9, seed=4, logprobs=2, profile="tree-8")
    expected = engine.generate("Hi", params)
    content = json.loads(file.read_text())
    assert content["made_by"] == "medusa-export generate --json"
    assert (content["profile"], content["acceptance"], content["seed"]) == ("tree-8", "lossless", 4)
    assert content["times"].keys() == {"queue", "prefill", "decode", "total"}
    assert content["usage"]["completion_tokens"] == expected.usage.completion_tokens
    assert content["usage"]["total_tokens"] == expected.usage.total_tokens
    for found, choice in zip(content["choices"], expected.choices, strict=True):
        for name in ("index", "text", "finish_reason", "stop_reason", "steps"):
            assert found[name] == getattr(choice, name)
        assert found["token_ids"] == list(choice.token_ids)
        assert found["accepted_by_depth"] == list(choice.accepted_by_depth)
        assert choice.logprobs is not None
        for mine, theirs in zip(found["logprobs"], choice.logprobs, strict=True):
            assert mine["token_id"] == theirs.token_id
            assert mine["logprob"] == pytest.approx(theirs.logprob, abs=1e-4)
            assert [one["token_id"] for one in mine["top"]] == [one.token_id for one in theirs.top]
    texts = [choice.text for choice in expected.choices]
    assert capsys.readouterr().out == "".join(
        f"--- answer {number} of 2 ---\n{text}\n" for number, text in enumerate(texts, 1)
    )


def test_a_text_ends_the_answer(tiny_bundle: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    text = engine.generate("Hi", SamplingParams(max_tokens=40)).text
    stop = text[12:14]
    escaped = stop.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    before = text[: text.index(stop)]
    assert generate(tiny_bundle, "Hi", "--max-tokens", 40, "--stop", escaped) == 0
    assert capsys.readouterr().out == f"{before}\n"
    assert generate(tiny_bundle, "Hi", "--max-tokens", 40, "--stop", escaped, "--include-stop-str-in-output") == 0
    assert capsys.readouterr().out == f"{before}{stop}\n"


@pytest.mark.parametrize("options", [[], ["--temperature", 1, "--n", 2], ["--repetition-penalty", 1.3]])
def test_compared_with_plain_decoding_a_lossless_answer_is_the_same(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[object]
) -> None:
    file = tmp_path / "out.json"
    arguments = [*options, "--max-tokens", 24, "--profile", "tree-8", "--compare", "--json", file]
    assert generate(tiny_bundle, "What is a tree?", *arguments) == 0
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("[tree-8] ") and shown[1].startswith("[plain] ")
    assert re.match(r"the same tokens; [\d.]+ times as fast as plain decoding", shown[2])
    content = json.loads(file.read_text())
    assert content["same_tokens"] is True
    assert (content["plain"]["profile"], content["plain"]["seed"]) == ("plain", content["seed"])
    texts = [[choice["text"] for choice in one["choices"]] for one in (content, content["plain"])]
    assert texts[0] == texts[1]


def test_figures_that_do_not_exist_are_left_out(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tiny_bundle, "Hi", "--max-tokens", 1, "--profile", "plain", "--compare") == 0
    figures, again, compared = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[plain\] 1 token; prompt of \d+ tokens in [\d.]+ s", figures)
    assert again.startswith("[plain] 1 token; ")
    assert compared == "the same tokens; too few of them to compare the speed"
    assert generate(tiny_bundle, "Hi", "--max-tokens", 2, "--profile", "plain") == 0
    assert "] 2 tokens, 1 step, 1.00 tokens/step, " in capsys.readouterr().err


def test_the_speed_of_answers_of_different_lengths_is_compared_per_token() -> None:
    def answered(tokens: int, seconds: float) -> GenerationResult:
        choice = Choice(0, "", tuple(range(tokens)), "stop", None, None, 9, (), (), seconds)
        return GenerationResult((1,), (choice,), 0, "tree-4", "typical", Times(0, 0, seconds, seconds))

    plain, result = answered(101, 2.0), answered(21, 0.25)  # 50 and 80 tokens per second
    assert "; 1.60 times as fast as plain decoding" in describe_comparison(plain, result)


def test_a_lossy_answer_is_marked(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    lossy = ["--acceptance", "typical", "--typical-epsilon", 0, "--typical-delta", 0]  # accepts every candidate
    assert generate(tiny_bundle, "Hi", *lossy, "--max-tokens", 24, "--compare", "--json", file) == 0
    shown = capsys.readouterr().err
    assert "acceptance typical: lossy, not the answer of plain decoding" in shown
    assert "DIFFERENT tokens from the answer's token " in shown
    content = json.loads(file.read_text())
    assert (content["acceptance"], content["same_tokens"]) == ("typical", False)


def test_options_of_the_prompt_reach_the_engine(
    tiny_bundle: Path, tmp_path: Path, submitted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, I"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    (tmp_path / "messages").write_text(json.dumps(messages))
    (tmp_path / "tools").write_text("\ufeff" + json.dumps(tools), encoding="utf-8")
    few = ["--max-tokens", 2]
    arguments = ["--messages", tmp_path / "messages", "--tools", tmp_path / "tools", "--continue-final-message"]
    named = ["--chat-template-argument", "thinking=false", "--chat-template-argument", 'style={"a": "b=c"}']
    assert generate(tiny_bundle, *arguments, *named, "--timeout", 60, *few) == 0
    prompt, params, options = submitted.pop()
    assert (prompt, params) == (messages, SamplingParams(max_tokens=2))
    assert options == {
        "raw": False,
        "sanitize": False,
        "tools": tools,
        "chat_template_arguments": {"thinking": False, "style": {"a": "b=c"}},
        "continue_final_message": True,
        "timeout": 60,
    }
    assert generate(tiny_bundle, "<|im_end|>", "--sanitize", "--raw", *few) == 0
    prompt, _, options = submitted.pop()
    assert (prompt, options["raw"], options["sanitize"]) == ("<|im_end|>", True, True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert generate(tiny_bundle, "-", *few) == 0
    assert submitted.pop()[0] == "from a pipe\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no prompt, expected one of PROMPT, --messages FILE and --batch-file FILE"),
        (["Hi", "--messages", "FILE"], "got PROMPT and --messages, expected one of"),
        (["Hi", "--batch-file", "FILE", "-o", "OUT"], "got PROMPT and --batch-file, expected one of"),
        (["Hi", "-o", "OUT"], "--output needs --batch-file FILE; leave it out"),
        (["Hi", "--force"], "--force needs --batch-file FILE; leave it out"),
        (["--batch-file", "FILE"], "--batch-file needs -o FILE"),
        (["--batch-file", "FILE", "-o", "OUT", "--compare"], "--compare does not go with --batch-file"),
        (["--batch-file", "FILE", "-o", "OUT", "--raw"], "--raw does not go with --batch-file"),
        (["--batch-file", "FILE", "-o", "OUT", "--tools", "FILE"], "--tools does not go with --batch-file"),
        (["--batch-file", "FILE", "-o", "OUT", "--timeout", "5"], "--timeout does not go with --batch-file"),
        (["Hi", "--timeout", "0"], "0.0 is not in the range x>0"),
        (["Hi", "--timeout", "inf"], "timeout is inf; expected a finite number of seconds above 0, or leave it out\n"),
        (["Hi", "--seed", "-1"], "expected a number from 0 up, or leave it out, which draws one\n"),
        (["Hi", "--n", "2"], "expected --n 1, as all answers would be equal"),
        (["--messages", "FILE", "--raw"], "--messages does not go with --raw, which uses no chat template; leave out"),
        (["Hi", "--tools", "FILE", "--raw"], "--tools does not go with --raw"),
        (["Hi", "--chat-template-argument", "a=1", "--raw"], "--chat-template-argument does not go with --raw"),
        (["Hi", "--continue-final-message", "--raw"], "--continue-final-message does not go with --raw"),
        (["Hi", "--max-tokens", "2", "--max-new-tokens", "3"], "--max-tokens is given 2 times, expected once"),
        (["Hi", "--chat-template-argument", "a"], "expected a name and a JSON value"),
        (["Hi", "--chat-template-argument", "=1"], "expected a name and a JSON value"),
        (["Hi", "--chat-template-argument", "a=word"], "a text is in double quotes"),
        (["Hi", "--chat-template-argument", "a=1", "--chat-template-argument", "a=2"], "got 'a' twice"),
        (["Hi", "--stop-token-ids", "300"], "stop_token_ids has the token id 300; expected one from 0 to 299"),
        (["Hi", "--allowed-token-ids", "2", "--min-tokens", "1"], "no token may be chosen"),
        (["Hi", "--profile", "tree-4", "--draft", "auto"], "--draft auto does not go with --profile, the same tree in"),
        (["Hi", "--accept", "typical"], "Did you mean one of: '--acceptance'"),
    ],
)
def test_wrong_usage(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    (tmp_path / "file").write_text("[]")
    places = {"FILE": str(tmp_path / "file"), "OUT": str(tmp_path / "out")}
    assert generate(tiny_bundle, *(places.get(word, word) for word in arguments)) == ExitCode.USAGE
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([""], "the prompt is empty"),
        (["word " * 600], "the prompt has "),
        (["Hi", "--profile", "oak"], "no profile 'oak'"),
        (["Hi", "--timeout", "1e-9"], "the deadline of the request passed"),
        (["Hi", "--tools", '{"a": 1}'], "expected a list of tools, which are JSON objects"),
        (["--messages", "[1]"], "expected a list of messages, which are JSON objects"),
        (["--messages", "[" * 100_000], "is not valid JSON: too many lists and objects are inside one another"),
        (["--messages", "[" * 900 + "]" * 900], "expected a list of messages"),
        (["--messages", '[{"role": "user", "content": 5}]'], "or null in a message of the assistant"),
        (["--messages", '[{"role": "user"}]'], "message 0 must have texts for 'role' and 'content'"),
        (["--messages", "\udcff"], "is not valid JSON: byte 1 is not UTF-8; expected a list of messages"),
    ],
)
def test_what_fails_is_one_line(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    if arguments[-2:-1] in (["--tools"], ["--messages"]):
        (tmp_path / "file").write_bytes(os.fsencode(arguments[-1]))
        arguments = [*arguments[:-1], str(tmp_path / "file")]
    assert generate(tiny_bundle, *arguments) == ExitCode.FAILURE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error
    assert error.count("\n") == 1


def test_an_interrupt_keeps_what_was_printed(tiny_bundle: Path) -> None:
    slow = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background process ignores it
        "from medusa_runtime.decoder import Decoder\n"
        "step = Decoder.step\n"
        "Decoder.step = lambda *arguments: (time.sleep(0.1), step(*arguments))[1]\n"
        "from medusa_exporter.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    words = [sys.executable, "-c", slow, "generate", str(tiny_bundle), "What is a tree?", "--ignore-eos"]
    with subprocess.Popen(words, stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, error.splitlines()[-1]) == (ExitCode.INTERRUPTED, b"interrupted")
    assert b"Traceback" not in error
    assert first and out.endswith(b"\n")


def test_a_drawn_seed_is_reported_and_gives_the_answer_again(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [tiny_bundle, "Hello", "--max-tokens", 8, "--temperature", 1]
    assert generate(*arguments) == 0
    first = capsys.readouterr()
    (seed,) = re.findall(r"drawn with --seed (\d+)", first.err)
    assert generate(*arguments, "--seed", seed) == 0
    again = capsys.readouterr()
    assert again.out == first.out and "--seed" not in again.err


def test_a_file_of_results_that_cannot_be_written_is_named(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # as on a full disk
    try:
        assert generate(tiny_bundle, "Hello", "--max-tokens", 2, "--json", tmp_path / "out.json") == ExitCode.FAILURE
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'out.json'} cannot be written: File too large; ")
    assert list(tmp_path.iterdir()) == []


def test_log_probabilities_without_a_place_are_reported(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [tiny_bundle, "Hello", "--max-tokens", 2, "--logprobs", 1]
    assert generate(*arguments) == 0
    assert "only written with --json" in capsys.readouterr().err
    assert generate(*arguments, "--json", "-") == 0
    assert "only written" not in capsys.readouterr().err


@pytest.mark.parametrize("files", [("-", "out"), ("in", "-")], ids=str)
def test_a_batch_has_files(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: tuple[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in", "-"):
        (tmp_path / name).write_text("")
    assert generate(tiny_bundle, "--batch-file", files[0], "-o", files[1]) == 2
    assert "expected their names, got -" in capsys.readouterr().err
