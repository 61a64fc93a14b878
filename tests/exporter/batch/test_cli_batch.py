"""`medusa-export generate --batch-file`: the responses are those of single requests, whatever stands between them."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.batch import answering
from medusa_exporter.batch.identity import seed_of
from medusa_exporter.cli.exit_codes import ExitCode
from medusa_profiles.toml import to_toml
from medusa_runtime import Bundle, Engine, SamplingParams
from medusa_runtime.errors import BackendError, CapacityError, EngineClosedError, InvalidLogitsError
from medusa_runtime.request_runner import RequestRunner

from ..bench.in_process import run
from .batches import answer, chat, completion, lines_of, without_time, write

FEW = [
    chat("first", "What is a tree?", max_tokens=8),
    completion("second", "the tree of", max_tokens=6, logprobs=2),
    chat("bad", "Hi", temperature=-1),
    chat("fourth", "Write code", max_completion_tokens=5, temperature=1.0, n=2, logprobs=True, top_logprobs=1),
    chat("last", "Hello", max_tokens=4, stop="e"),
]
SUMMARY = re.compile(r"(\d+) answered, (\d+) refused \(status 400\), (\d+) failed \(status 500\) -> ")


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine.load(tiny_bundle, threads=1)


def test_the_output_has_openais_form(
    tiny_bundle: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write(tmp_path / "in.jsonl", FEW), tmp_path / "out.jsonl"
    assert answer(tiny_bundle, file, output, "--json", tmp_path / "summary.json") == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl", "summary.json"]
    shown = capsys.readouterr()
    assert shown.out == f"4 answered, 1 refused (status 400), 0 failed (status 500) -> {output}\n"
    assert re.match(r"\d+ tokens in [\d.]+ s, [\d.]+ tokens/s, \d\.\d\d tokens/step\n$", shown.err)
    lines = lines_of(output)
    assert [line["custom_id"] for line in lines] == [line["custom_id"] for line in FEW]
    assert all(line.keys() == {"id", "custom_id", "response", "error"} and line["error"] is None for line in lines)
    assert all(line["id"] == f"medusa-batch-{line['response']['request_id']}" for line in lines)
    assert len({line["id"] for line in lines}) == len(lines)
    assert [line["response"]["status_code"] for line in lines] == [200, 200, 400, 200, 200]
    bodies = [line["response"]["body"] for line in lines]
    assert bodies[2] == {
        "error": {
            "message": "temperature is -1.0; expected a finite number from 0 up",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": None,
        }
    }
    digest = Bundle.open(tiny_bundle).manifest.digest
    assert [body["object"] for body in (bodies[0], bodies[1])] == ["chat.completion", "text_completion"]
    assert (bodies[0]["model"], bodies[1]["model"]) == ("tiny", engine.bundle.model.name)
    assert bodies[0]["system_fingerprint"] == digest[:16]
    single = engine.generate("What is a tree?", SamplingParams(max_tokens=8))
    assert bodies[0]["choices"][0]["message"] == {"role": "assistant", "content": single.text, "refusal": None}
    assert bodies[0]["usage"]["prompt_tokens"] == len(single.prompt_token_ids)
    raw = engine.generate("the tree of", SamplingParams(max_tokens=6), raw=True)
    assert bodies[1]["choices"][0]["text"] == raw.text
    assert len(bodies[1]["choices"][0]["logprobs"]["tokens"]) == len(raw.token_ids)
    assert [len(choice["logprobs"]["content"][0]["top_logprobs"]) for choice in bodies[3]["choices"]] == [1, 1]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["requests"], summary["answered"], summary["refused"], summary["resumed"]) == (5, 4, 1, 0)
    assert summary["completion_tokens"] == sum(body["usage"]["completion_tokens"] for body in bodies if "usage" in body)


def never(*_arguments: Any, **_options: Any) -> Engine:
    raise AssertionError("an engine was loaded")


def mixed(count: int) -> list[dict[str, Any]]:
    """Requests of every kind, among them bad ones of every kind."""
    kinds = [
        lambda name: chat(name, f"question {name}", max_tokens=4),
        lambda name: completion(name, f"the {name}", max_tokens=3),
        lambda name: completion(name, [5, 6, 7 + len(name)], max_tokens=3),
        lambda name: chat(name, f"drawn {name}", max_tokens=4, temperature=1.0),
        lambda name: chat(name, "Hi", frobnicate=1),
        lambda name: chat(name, "word " * 600),
        lambda name: completion(name, [1, 2, 300]),
        lambda name: chat(name, ""),
        lambda name: {**chat(name, ""), "body": {"messages": []}},
        lambda name: chat(name, "Hi", stop_token_ids=[1000]),
        lambda name: chat(name, "Hi", allowed_token_ids=[2], min_tokens=1),
        lambda name: chat(name, "word " * 600, max_tokens=2, truncate_prompt_tokens=20),
        lambda name: {**chat(name, ""), "body": {"messages": [{"role": "user", "content": "\ud800"}]}},
    ]
    return [kinds[number % len(kinds)](f"r{number}") for number in range(count)]


def test_three_hundred_requests_with_errors_between_them(
    tiny_bundle: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = mixed(300)
    file, output = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert answer(tiny_bundle, file, output) == 0
    found = lines_of(output)
    assert [line["custom_id"] for line in found] == [f"r{number}" for number in range(300)]
    good = {0, 1, 2, 3, 7, 11}
    expected = [200 if number % 13 in good else 400 for number in range(300)]
    assert [line["response"]["status_code"] for line in found] == expected
    counts = Counter(expected)
    shown = capsys.readouterr()
    assert "ended with" not in shown.err  # with numbers of the engine, which nobody can map
    summary = SUMMARY.match(shown.out)
    assert summary is not None and tuple(map(int, summary.groups())) == (counts[200], counts[400], 0)
    for line, data in zip(found, file.read_bytes().splitlines(), strict=True):
        number, body = int(line["custom_id"][1:]), line["response"]["body"]
        kind, name = number % 13, line["custom_id"]
        if kind == 0:
            single = engine.generate(f"question {name}", SamplingParams(max_tokens=4))
            assert body["choices"][0]["message"]["content"] == single.text
        elif kind == 1:
            single = engine.generate(f"the {name}", SamplingParams(max_tokens=3), raw=True)
            assert body["choices"][0]["text"] == single.text
        elif kind == 3:
            params = SamplingParams(max_tokens=4, temperature=1.0, seed=seed_of(data))
            single = engine.generate(f"drawn {name}", params)
            assert body["choices"][0]["message"]["content"] == single.text
        elif kind == 5:
            assert body["error"]["code"] == "context_length_exceeded"
        elif kind == 11:
            assert body["usage"]["prompt_tokens"] == 20


def test_sampling_options_are_the_defaults_of_the_bodies(tiny_bundle: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", [chat("a", "Hi"), chat("b", "Hi", max_tokens=3, n=None, seed=6)])
    options = ["--max-tokens", 5, "--temperature", 1, "--seed", 5, "--n", 2, "--logprobs", 0, "--ignore-eos"]
    assert answer(tiny_bundle, file, tmp_path / "out.jsonl", *options) == 0
    bodies = [line["response"]["body"] for line in lines_of(tmp_path / "out.jsonl")]
    assert [body["usage"]["completion_tokens"] for body in bodies] == [10, 6]
    assert all(choice["logprobs"]["content"] for body in bodies for choice in body["choices"])
    drawn = [body["choices"][0]["message"]["content"] for body in bodies]
    assert not drawn[0].startswith(drawn[1])


def test_options_of_the_prompt_apply_to_all_requests(tiny_bundle: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", [chat("a", "<|im_end|>", max_tokens=1)])
    counts = []
    for number, options in enumerate(([], ["--sanitize"], ["--chat-template-argument", "x=1"])):
        output = tmp_path / f"{number}.jsonl"
        assert answer(tiny_bundle, file, output, *options) == 0
        counts.append(lines_of(output)[0]["response"]["body"]["usage"]["prompt_tokens"])
    assert counts[1] > counts[0] == counts[2]


def test_the_tree_does_not_change_greedy_output(tiny_bundle: Path, tmp_path: Path) -> None:
    file, found = write(tmp_path / "in.jsonl", FEW), []
    for tree in ("plain", "tree-8"):
        assert answer(tiny_bundle, file, tmp_path / tree, "--profile", tree) == 0
        found.append(without_time(tmp_path / tree))
    for plain, tree in zip(*found, strict=True):
        assert plain["id"] == tree["id"]
        choices = [one["response"]["body"].get("choices", []) for one in (plain, tree)]
        texts = [[choice.get("message", choice.get("text")) for choice in one] for one in choices]
        assert texts[0] == texts[1]


def test_a_finished_output_is_up_to_date_and_force_starts_anew(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = write(tmp_path / "in.jsonl", FEW), tmp_path / "out.jsonl"
    assert answer(tiny_bundle, file, output) == 0
    content, summary = output.read_bytes(), capsys.readouterr().out
    output.touch()
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "load", never)
        assert answer(tiny_bundle, file, output, "--json", tmp_path / "summary") == 0
        shown = capsys.readouterr()
        assert "out.jsonl is up to date, 5 responses; --force answers all requests anew" in shown.err
        assert shown.out == summary
        assert json.loads((tmp_path / "summary").read_text())["resumed"] == 5
        assert answer(tiny_bundle, file, output, "--max-tokens", 7) == 1
        error = capsys.readouterr().err
        assert "out.jsonl:1 is of another precision or other parameters" in error and "--force" in error
    assert output.read_bytes() == content
    assert answer(tiny_bundle, file, output, "--max-tokens", 7, "--force") == 0
    assert output.read_bytes() != content
    assert not (tmp_path / "out.jsonl.part").exists()


def test_a_changed_input_is_refused(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = write(tmp_path / "in.jsonl", FEW), tmp_path / "out.jsonl"
    assert answer(tiny_bundle, file, output) == 0
    content = output.read_bytes()
    for lines, reason in (
        ([*FEW, chat("more", "Hi")], "has 5 responses, expected one to each request"),
        (FEW[:-1], "has more responses than there are requests"),
        ([*FEW[:3], FEW[4], FEW[3]], "out.jsonl:4 is of another request, expected the response to line 4"),
        ([*FEW[:4], FEW[4] | {"custom_id": "renamed"}], "out.jsonl:5 is of another request"),
    ):
        write(file, lines)
        assert answer(tiny_bundle, file, output) == 1
        assert reason in capsys.readouterr().err
    assert output.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    output.write_bytes(content.replace(b'"custom_id": "fourth"', b'"custom_id": "forth"'))
    assert answer(tiny_bundle, write(file, FEW), output) == 1
    assert "out.jsonl:4 is of the custom_id 'forth' in place of 'fourth'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"custom_id": "a"}', "in.jsonl:6: method is None; expected 'POST'"),
        (json.dumps(FEW[0]), "in.jsonl:6: the custom_id is that of line 1"),
        ("{", "in.jsonl:6 is not valid JSON"),
    ],
)
def test_a_bad_line_ends_the_command_before_the_model_is_loaded(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    reason: str,
) -> None:
    monkeypatch.setattr(Engine, "load", never)
    file = write(tmp_path / "in.jsonl", FEW)
    file.write_text(file.read_text() + line)
    assert answer(tiny_bundle, file, tmp_path / "out.jsonl") == ExitCode.FAILURE
    assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_outputs_have_a_place_of_their_own(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "in.jsonl", FEW)
    output = tmp_path / "out.jsonl"
    for arguments, reason in (
        ([output, "--json", output], "is where the command writes"),
        ([output, "--json", f"{output}.part"], "is where the command writes"),
        ([file], "is one of the files to read"),
        ([tiny_bundle / "out.jsonl"], "is inside of the bundle"),
        ([output, "--expected-digest", "a" * 64], "expected aaaa"),
        ([output, "--precision", "int4"], "has no graph for backend ort-cpu, precision int4"),
        ([output, "--profile", "oak"], "has no profile 'oak'"),
    ):
        assert answer(tiny_bundle, file, *arguments) == ExitCode.FAILURE
        assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert len(file.read_text().splitlines()) == len(FEW)


def test_a_chat_without_a_template_is_refused_before_the_work(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bundle, "chat_template", None)
    monkeypatch.setattr(Engine, "load", never)
    file = write(tmp_path / "in.jsonl", [completion("a", "x"), chat("b", "x")])
    assert answer(tiny_bundle, file, tmp_path / "out.jsonl") == 1
    assert "has no chat template, which" in (error := capsys.readouterr().err)
    assert "in.jsonl:2 needs" in error


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, numbers: set[int]) -> None:
    """Let the engine fail with some requests, by their number in it."""
    run_one = RequestRunner.answer

    def wrapped(self: RequestRunner, request: Any, checkpoint: Any) -> None:
        if request.number in numbers:
            self.fail(request, error)
        else:
            run_one(self, request, checkpoint)

    monkeypatch.setattr(RequestRunner, "answer", wrapped)


@pytest.mark.parametrize("error", [InvalidLogitsError("NaN"), CapacityError("no memory")])
def test_a_failure_is_a_line_too(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    failing(monkeypatch, error, {2, 4})
    file, output = write(tmp_path / "in.jsonl", FEW), tmp_path / "out.jsonl"
    assert answer(tiny_bundle, file, output) == 0
    shown = capsys.readouterr()
    assert "2 answered, 1 refused (status 400), 2 failed (status 500)" in shown.out
    warnings = [line for line in shown.err.splitlines() if line.startswith("warning: ")]
    assert warnings == [f"warning: {file}:{line} failed: {error}" for line in (2, 5)]  # line 3 never reaches the engine
    body = lines_of(output)[1]["response"]["body"]
    assert body == {"error": {"message": str(error), "type": "server_error", "param": None, "code": None}}


def test_what_may_have_paths_is_printed_and_not_written_for_clients(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, BackendError("/srv/model.onnx: a node failed"), {2})
    file, output = write(tmp_path / "in.jsonl", FEW), tmp_path / "out.jsonl"
    assert answer(tiny_bundle, file, output) == 0
    assert f"warning: {file}:2 failed: /srv/model.onnx: a node failed" in capsys.readouterr().err
    assert "/srv" not in output.read_text()
    assert "BackendError" in lines_of(output)[1]["response"]["body"]["error"]["message"]


def test_figures_that_do_not_exist_are_not_printed(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for lines, pattern in (
        ([chat("a", "Hi", max_tokens=1)], r"1 token in [\d.]+ s, [\d.]+ tokens/s\n"),
        ([chat("a", "Hi", allowed_token_ids=[2], min_tokens=1)], ""),
        ([chat("a", "Hi", unknown=1)], ""),
    ):
        assert answer(tiny_bundle, write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", "--force") == 0
        assert re.fullmatch(pattern, capsys.readouterr().err)
    assert answer(tiny_bundle, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 0
    assert "out.jsonl is up to date, 1 response; --force" in capsys.readouterr().err


def test_failures_in_a_row_end_the_batch_and_are_tried_again(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 3 + 2 * answering.MAX_FAILURES
    file = write(tmp_path / "in.jsonl", [chat(f"r{number}", "Hi", max_tokens=2) for number in range(count)])
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with monkeypatch.context() as patched:
        failing(patched, InvalidLogitsError("NaN"), {2, *range(4, 99)})
        assert answer(tiny_bundle, file, output) == 1
    last = 3 + answering.MAX_FAILURES
    assert f"the last 8 requests failed, up to line {last} of {file}: NaN" in capsys.readouterr().err
    assert [line["response"]["status_code"] for line in lines_of(part)] == [200, 500, 200]
    assert answer(tiny_bundle, file, output) == 0
    shown = capsys.readouterr()
    assert f"resuming behind 3 responses in {part}" in shown.err
    assert f"{count - 1} answered, 0 refused (status 400), 1 failed (status 500)" in shown.out


@pytest.mark.parametrize("error", [EngineClosedError("gone"), ZeroDivisionError("a bug")])
def test_the_end_of_the_engine_ends_the_batch(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    failing(monkeypatch, error, {3})
    file, output = write(tmp_path / "in.jsonl", FEW), tmp_path / "out.jsonl"
    assert answer(tiny_bundle, file, output) == 1
    assert str(error) in capsys.readouterr().err
    assert len(lines_of(tmp_path / "out.jsonl.part")) == 3
    assert not output.exists()


def test_no_more_requests_are_queued_than_stated(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, run_one, most = Engine.submit, RequestRunner.answer, []

    def counted(self: Engine, *arguments: Any, **options: Any) -> Any:
        handle = submit(self, *arguments, **options)
        most.append(self.stats().waiting)
        return handle

    def slow(self: RequestRunner, request: Any, checkpoint: Any) -> None:
        time.sleep(0.02)  # longer than a prompt takes
        run_one(self, request, checkpoint)

    monkeypatch.setattr(Engine, "submit", counted)
    monkeypatch.setattr(RequestRunner, "answer", slow)
    lines = [chat(f"r{number}", "Hi", max_tokens=1) for number in range(60)]
    assert answer(tiny_bundle, write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl") == 0
    assert 1 < max(most) <= answering.QUEUED + 1


def test_a_lossy_batch_depends_on_the_tree(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write(tmp_path / "in.jsonl", FEW[:1]), tmp_path / "out.jsonl"
    own = dataclasses.replace(Bundle.open(tiny_bundle).profile("tree-4"), name="own")
    (tmp_path / "own.toml").write_text(to_toml(own), encoding="utf-8")
    lossy = ["--acceptance", "typical", "--typical-epsilon", 0.2]
    for tree, other in ((tmp_path / "own.toml", "tree-8"), ("tree-8", tmp_path / "own.toml")):
        assert answer(tiny_bundle, file, output, *lossy, "--profile", tree, "--force") == 0
        assert answer(tiny_bundle, file, output, *lossy, "--profile", tree) == 0
        assert answer(tiny_bundle, file, output, *lossy, "--profile", other) == 1
        assert "is of another precision or other parameters" in capsys.readouterr().err


def test_json_on_standard_output_is_alone_there(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "in.jsonl", FEW)
    assert run("generate", tiny_bundle, "--batch-file", file, "-o", tmp_path / "out", "--json", "-", "-q") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["answered"] == 4
    assert shown.err == ""


@pytest.mark.parametrize("change", ["emptied", "shortened", "extended", "reordered"])
def test_an_input_that_changes_meanwhile_is_not_published(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    requests = [chat(f"c{number}", f"prompt {number}", max_tokens=2) for number in range(4)]
    changed = {
        "emptied": [],
        "shortened": requests[:2],
        "extended": [*requests, chat("c9", "more", max_tokens=2)],
        "reordered": requests[::-1],
    }[change]
    file, output = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    check = answering.check_requests

    def check_then_change(path: Path) -> answering.BatchFacts:
        found = check(path)
        write(path, changed)
        return found

    monkeypatch.setattr(answering, "check_requests", check_then_change)
    assert answer(tiny_bundle, file, output) == ExitCode.FAILURE
    assert "changed while its requests were answered; expected the same 4 requests" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(("precision", "is_reused"), [("fp32", True), ("w8a8", False)])
def test_requests_reuse_prompts_where_that_cannot_change_an_answer(
    tiny_precisions: Path, tmp_path: Path, precision: str, is_reused: bool
) -> None:
    file = write(tmp_path / "in.jsonl", [chat(name, "A long tree. " * 9 + name, max_tokens=2) for name in "ab"])
    assert answer(tiny_precisions, file, tmp_path / "out.jsonl", "--precision", precision) == 0
    usages = [line["response"]["body"]["usage"] for line in lines_of(tmp_path / "out.jsonl")]
    first, second = (usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert first == 0
    assert (second > 9) is is_reused
