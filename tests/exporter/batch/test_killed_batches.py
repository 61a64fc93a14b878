"""A batch that was killed, wherever it was: the same command resumes it and gives what an unbroken run gives."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from medusa_exporter.cli.exit_codes import ExitCode

from .batches import answer, chat, completion, without_time, write

LINES = [
    chat("a", "What is a tree?", max_tokens=4),
    chat("b", "Hi", max_tokens=4, temperature=1.0, n=2),
    completion("c", "Grüße \u2028", max_tokens=3, logprobs=1),
    chat("d", "Hi", unknown=1),
    chat("e", "Bye", max_tokens=4, temperature=1.0),
]
# sends the process a signal when it has written so many responses, or is about to give the output its name
CODE = """
import os, signal, sys
from medusa_exporter.batch import answering, responses_file
signal.signal(signal.SIGINT, signal.default_int_handler)
left, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
write, publish = answering._Run._write, responses_file.ResponsesFile.publish
def strike():
    global left
    if left == 0: os.kill(os.getpid(), number)
    left -= 1
def wrapped_write(*arguments): strike(); write(*arguments)
def wrapped_publish(*arguments): strike(); publish(*arguments)
answering._Run._write, responses_file.ResponsesFile.publish = wrapped_write, wrapped_publish
from medusa_exporter.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    assert answer(tiny_bundle, write(folder / "in.jsonl", LINES), folder / "out.jsonl") == 0
    return folder / "out.jsonl"


def struck(
    bundle: Path, folder: Path, after: int, number: signal.Signals, *options: str, size: int = resource.RLIM_INFINITY
) -> tuple[int, str]:
    """Run the command in a process that gets a signal; return its exit code and what it printed to standard error.

    Its files may have `size` bytes.
    """
    words = ["generate", str(bundle), "--batch-file", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]
    command = [sys.executable, "-c", CODE, str(after), str(int(number)), *words, "--threads", "1", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)),
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("after", range(len(LINES) + 1))
def test_a_kill_behind_every_line(
    tiny_bundle: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], after: int
) -> None:
    file, output, part = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    assert struck(tiny_bundle, tmp_path, after, signal.SIGKILL)[0] == -signal.SIGKILL
    written = part.read_bytes()
    assert written.count(b"\n") == after and not output.exists()
    assert answer(tiny_bundle, file, output) == 0
    assert ("resuming behind" in capsys.readouterr().err) == (after > 0)
    assert output.read_bytes().startswith(written)
    assert without_time(output) == without_time(whole)
    assert not part.exists()


def test_a_part_that_ends_within_any_line_is_resumed(tiny_bundle: Path, whole: Path, tmp_path: Path) -> None:
    file, output, part = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    lines = whole.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        for rest in (line[:1], line[: len(line) // 2], line[:-1], b"\x00" * 100, b"\x00" * 100 + b"\n"):
            if number == 0 and rest.startswith(b"\x00"):
                continue  # such a file is not recognised as an output
            part.write_bytes(b"".join(lines[:number]) + rest)
            assert answer(tiny_bundle, file, output) == 0
            assert output.read_bytes().startswith(b"".join(lines[:number]))
            assert without_time(output) == without_time(whole)
            output.unlink()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED)]
)
def test_an_interrupted_batch_is_resumed(
    tiny_bundle: Path, whole: Path, tmp_path: Path, number: signal.Signals, code: ExitCode
) -> None:
    file, output = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    for after in (0, 2):
        found, error = struck(tiny_bundle, tmp_path, after, number)
        assert (found, error.splitlines()[-1]) == (code, code.name.lower())
        assert "Traceback" not in error
        assert (tmp_path / "out.jsonl.part").exists() == (after > 0)  # nothing stays of what was not begun
    assert answer(tiny_bundle, file, output) == 0
    assert without_time(output) == without_time(whole)


def test_a_killed_run_with_force_is_resumed_without_it(tiny_bundle: Path, whole: Path, tmp_path: Path) -> None:
    file, output, part = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    assert answer(tiny_bundle, file, output, "--max-tokens", 2) == 0
    before = output.read_bytes()
    for after in (0, 3):
        assert struck(tiny_bundle, tmp_path, after, signal.SIGKILL, "--force")[0] == -signal.SIGKILL
        assert output.read_bytes() == before
        assert part.read_bytes().count(b"\n") == after
    assert answer(tiny_bundle, file, output) == 0
    assert without_time(output) == without_time(whole)
    assert not part.exists()


def test_another_command_does_not_resume_the_batch(
    tiny_bundle: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output, part = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    begun = b"".join(whole.read_bytes().splitlines(keepends=True)[:2])
    part.write_bytes(begun)
    for options in (["--seed", 1], ["--sanitize"], ["--max-length", 400], ["--chat-template-argument", "a=1"]):
        assert answer(tiny_bundle, file, output, *options) == 1
        assert "out.jsonl.part:1 is of another precision or other parameters" in capsys.readouterr().err
    write(file, [LINES[0], LINES[2], LINES[1], *LINES[3:]])
    assert answer(tiny_bundle, file, output) == 1
    assert "out.jsonl.part:2 is of another request, expected the response to line 2" in capsys.readouterr().err
    assert part.read_bytes() == begun
    write(file, LINES)
    assert answer(tiny_bundle, file, output, "--profile", "tree-8") == 0  # a lossless answer does not depend on it
    assert output.read_bytes().startswith(begun)


def test_a_file_that_may_not_grow_ends_the_batch_and_is_resumed(
    tiny_bundle: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a full disk, at every kind of place: in the first line, within a line, and at the end of one."""
    file, output, part = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    lines = whole.read_bytes().splitlines(keepends=True)
    begun = len(b"".join(lines[:2]))
    for size in (100, begun, begun + 50):
        found, error = struck(tiny_bundle, tmp_path, 99, signal.SIGTERM, size=size)
        assert (found, error.count("Traceback")) == (ExitCode.FAILURE, 0)
        last = error.splitlines()[-1]
        assert last.startswith(f"error: {part} cannot be written as the output {output}: File too large; ")
        assert "kept" in last and "repeat the command" in last
        assert part.stat().st_size == size
    assert answer(tiny_bundle, file, output) == 0
    assert "resuming behind 2 responses" in capsys.readouterr().err
    assert without_time(output) == without_time(whole)
