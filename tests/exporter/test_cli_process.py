"""`medusa-export` as a process: exit codes, signals, closed pipes, terminals without UTF-8, missing packages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from medusa_exporter.cli.exit_codes import MEANINGS, ExitCode
from medusa_exporter.extras import EXTRAS

NOISE = ("Traceback", "Exception ignored", "BrokenPipe", "Errno 32")
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
COMMANDS = (
    "bench", "build", "compare", "distill", "engines", "generate", "heads", "heads convert", "heads-report", "inspect",
    "profiles", "report", "train", "verify",
)  # fmt: skip
RUN = [sys.executable, "-m", "medusa_exporter"]
BLOCK = "import os, sys\nfor name in os.environ.get('BLOCKED', '').split(','):\n    if name: sys.modules[name] = None\n"


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [*RUN, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | environment)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"turns": ["Hi"]}\n')
    return file


def test_help_documents_every_exit_code() -> None:
    shown = run("--help")
    assert shown.returncode == ExitCode.SUCCESS
    for code in MEANINGS:
        assert f"\n  {int(code):<3} " in shown.stdout
    assert MEANINGS.keys() == set(ExitCode)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["profiles", "tree-8"], ExitCode.SUCCESS),
        (["profiles", "no-such-tree"], ExitCode.FAILURE),
        (["inspect", "no-such-folder"], ExitCode.FAILURE),
        ([], ExitCode.USAGE),
        (["no-such-command"], ExitCode.USAGE),
        (["profiles", "--no-such-option"], ExitCode.USAGE),
        (["-q", "profiles", "-v"], ExitCode.USAGE),
    ],
)
def test_exit_codes(arguments: list[str], code: ExitCode) -> None:
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert bool(done.stderr) == (code != ExitCode.SUCCESS)
    assert not any(noise in done.stderr for noise in NOISE)


def test_a_check_that_does_not_pass_is_a_failure(tiny_bundle: Path, prompts: Path, tmp_path: Path) -> None:
    code = (
        "from medusa_runtime import Decoder, accept, loading\n"
        "from medusa_exporter.cli import main\n"
        "def wrongly(tree, tokens, argmax, logits):\n"
        "    return ([0, 1], argmax[1]) if tree.size > 1 else accept.greedy(tree, tokens, argmax, logits)\n"
        "loading.Decoder = lambda backend, profile: Decoder(backend, profile, wrongly)\n"
        "main()\n"
    )
    arguments = ["verify", tiny_bundle, "--prompts", prompts, "--profile", "tree-4", "--max-new-tokens", 8]
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.FAILURE, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, ExitCode.INTERRUPTED, "interrupted"), (signal.SIGTERM, ExitCode.TERMINATED, "terminated")],
)
def test_signals_end_a_command_in_one_line(number: signal.Signals, code: ExitCode, word: str) -> None:
    waiting = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background process ignores it
        "class Input:\n"
        "    def read(self):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "sys.stdin = Input()\n"
        "from medusa_exporter.cli import main\n"
        "main(['generate', 'bundle', '-'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", waiting], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (code, f"{word}\n")


def closed(arguments: Sequence[object], *, both: bool = False) -> tuple[int, str]:
    """Run a command whose output nobody reads; both: standard error goes the same way."""
    words = [*RUN, *map(str, arguments)]
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(words, stdout=write, stderr=write if both else -1, text=True) as process:
        os.close(write)
        _, error = process.communicate(timeout=120)
    return process.returncode, error or ""


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_a_closed_pipe_ends_help_quietly(arguments: list[str]) -> None:
    words = " ".join(arguments).split()
    assert closed([*words, "--help"]) == (ExitCode.CLOSED_PIPE, "")


def test_a_closed_pipe_ends_every_command_that_prints_quietly(
    tiny_precisions: Path, prompts: Path, tmp_path: Path
) -> None:
    few = ["--prompts", prompts, "--profile", "tree-4"]
    for arguments in (
        ["profiles"],
        ["profiles", "tree-8"],
        ["profiles", "--json", "-"],
        ["--version"],
        ["inspect", tiny_precisions],
        ["generate", tiny_precisions, "Hi", "--max-new-tokens", 4],
        ["verify", tiny_precisions, *few, "--max-new-tokens", 4],
        ["bench", tiny_precisions, *few, "--max-new-tokens", 4],
        ["compare", tiny_precisions, *few, "--steps", 1, "--backend", "ort-cpu:fp32,ort-cpu:int8"],
    ):
        code, error = closed([*arguments, "-q"] if arguments != ["--version"] else arguments)
        assert (code, error) == (ExitCode.CLOSED_PIPE, ""), arguments
    read, write = os.pipe()
    os.close(read)
    words = [*RUN, "generate", str(tiny_precisions), "Hi", "--max-new-tokens", "4"]
    with subprocess.Popen(words, stdout=-1, stderr=write, text=True) as process:  # nobody reads the speed
        os.close(write)
        assert process.wait(timeout=120) == ExitCode.CLOSED_PIPE
    assert closed(["profiles", "no-such-tree"], both=True)[0] == ExitCode.FAILURE  # though nobody reads the error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*RUN, "profiles"], stdout=full, stderr=-1, text=True, check=False)
    assert done.returncode == ExitCode.FAILURE
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_output_survives_a_terminal_without_utf8(tiny_bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "bündel–✓"
    link.symlink_to(tiny_bundle)
    folder = os.fsencode(link)
    for arguments, code in (
        (["profiles"], ExitCode.SUCCESS),
        (["profiles", "b\u00e4ume"], ExitCode.FAILURE),
        (["inspect", folder], ExitCode.SUCCESS),
        (["inspect", folder, "--json", "-"], ExitCode.SUCCESS),
        (["inspect", folder + b"?"], ExitCode.FAILURE),
        (["generate", folder, "gr\u00fc\u00dfe \u2713", "--max-new-tokens", "24"], ExitCode.SUCCESS),
        (["generate", folder, "Hi", "--profile", "\u2713"], ExitCode.FAILURE),
        (["verify", folder, "--profile", "\u2713"], ExitCode.FAILURE),
        (["--n\u00f6"], ExitCode.USAGE),
    ):
        words = [*RUN, *arguments]
        done = subprocess.run(words, capture_output=True, check=False, env=os.environ | ASCII)
        assert done.returncode == code, (arguments, done.stderr)
        for text in (done.stdout, done.stderr):
            assert text.isascii(), (arguments, text)
            assert b"Traceback" not in text and b"UnicodeEncodeError" not in text, (arguments, text)
        if "-" in arguments:
            json.loads(done.stdout)


def test_a_file_name_that_is_no_text_is_shown(tmp_path: Path) -> None:
    done = subprocess.run([*RUN, "inspect", os.fsencode(tmp_path) + b"/\xff"], capture_output=True, check=False)
    assert done.returncode == ExitCode.FAILURE
    assert b"no such bundle" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("quiet", ["before", "after", None])
def test_quiet_prints_results_and_errors_only(tiny_bundle: Path, prompts: Path, quiet: str | None) -> None:
    before, after = (["-q"] if quiet == where else [] for where in ("before", "after"))
    arguments = ["verify", tiny_bundle, "--prompts", prompts, "--profile", "tree-4", "--max-new-tokens", 4]
    done = run(*before, *arguments, *after)
    assert done.returncode == ExitCode.SUCCESS, done.stderr
    assert "the same tokens" in done.stdout
    assert ("prompt 1/1" in done.stderr) == (quiet is None)
    assert quiet is None or not done.stderr
    failed = run(*before, "profiles", "no-such-tree", *after)
    assert failed.stderr.startswith("error: ")


@pytest.mark.parametrize("arguments", [["--debug", "profiles", "x"], ["profiles", "x", "--debug"]])
def test_debug_shows_the_traceback_before_the_error(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == ExitCode.FAILURE
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_json_on_standard_output_is_alone_there(tiny_bundle: Path, prompts: Path, tmp_path: Path) -> None:
    few = ["--prompts", prompts, "--profile", "tree-4", "--max-new-tokens", 4, "--json"]
    for arguments in (
        ["verify", tiny_bundle, *few, "-"],
        ["bench", tiny_bundle, *few, "-"],
        ["generate", tiny_bundle, "Hi", "--max-new-tokens", 4, "--compare", "--json", "-"],
        ["inspect", tiny_bundle, "--json", "-"],
        ["profiles", "--json", "-"],
        ["profiles", "tree-8", "--json", "-"],
    ):
        done = run(*arguments)
        assert done.returncode == ExitCode.SUCCESS, done.stderr
        content = json.loads(done.stdout)
        assert content["made_by"].startswith(f"medusa-export {arguments[0]}")
        assert done.stderr
        silent = run("-q", *arguments)
        assert (json.loads(silent.stdout).keys(), silent.stderr) == (content.keys(), "")
    assert run("verify", tiny_bundle, *few, tmp_path / "file").returncode == ExitCode.SUCCESS
    assert json.loads((tmp_path / "file").read_text())["passed"] is True


MODEL, HEADS, BUNDLE, PROMPTS, DATA, OUT, RUNS = "MODEL", "HEADS", "BUNDLE", "PROMPTS", "DATA", "OUT", "RUNS"
NEEDED = {  # for each command, modules that it cannot do without; those with a comma are alternatives
    "build MODEL --heads HEADS -o OUT": "torch transformers onnx onnxscript onnx_ir safetensors onnxruntime",
    "build some/model --heads HEADS -o OUT": "huggingface_hub",
    "build MODEL --heads HEADS -o OUT --backend tensorrt": "tensorrt,tensorrt_bindings",
    "build MODEL --heads HEADS -o OUT --backend tensorrt-rtx --target sm86": "tensorrt_rtx,tensorrt_rtx_bindings",
    "distill MODEL --prompts PROMPTS -o OUT --context 64 --max-new-tokens 8": "torch transformers safetensors",
    "train MODEL --data DATA -o OUT": "torch safetensors",
    "heads-report MODEL HEADS --data DATA": "torch safetensors",
    "heads convert HEADS -o OUT": "torch safetensors",
    "heads convert some/heads -o OUT": "huggingface_hub",
    "generate BUNDLE Hi": "onnxruntime",
    "verify BUNDLE --profile tree-4": "onnxruntime",
    "verify BUNDLE --profile tree-4 --model MODEL": "torch transformers",
    "bench BUNDLE --prompts PROMPTS --profile tree-4": "onnxruntime",
    "compare BUNDLE --backend ort-cpu,ort-cpu": "polygraphy onnxruntime",
    "engines BUNDLE --backend tensorrt": "tensorrt,tensorrt_bindings",
    "report RUNS -o OUT": "matplotlib",
}


@pytest.mark.parametrize(("line", "module"), [(line, name) for line, names in NEEDED.items() for name in names.split()])
def test_a_missing_package_is_one_line_with_the_pip_command(
    tiny_engines: Path, tiny_model: Path, tiny_heads: Path, tmp_path: Path, line: str, module: str, prompts: Path
) -> None:
    from .report.factories import content, written

    written(tmp_path / "runs.json", content({"ort-cpu": 1.0}))
    (tmp_path / "data").mkdir()
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(BLOCK)  # in processes that a command starts too
    places = {
        MODEL: tiny_model,
        HEADS: tiny_heads,
        BUNDLE: tiny_engines,
        PROMPTS: prompts,
        DATA: tmp_path / "data",
        OUT: tmp_path / "out",
        RUNS: tmp_path / "runs.json",
    }
    words = [places.get(word, word) for word in line.split()]
    path = os.pathsep.join([str(tmp_path / "block"), *filter(None, sys.path)])
    done = run(*words, BLOCKED=module, PYTHONPATH=path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == ExitCode.FAILURE, done.stderr
    assert last.startswith("error: ") and "is not installed" in last, done.stderr
    assert "pip install 'medusa-export[" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_command_is_tried_without_packages() -> None:
    tried = {line.split()[0] if "convert" not in line else "heads convert" for line in NEEDED}
    assert tried == set(COMMANDS) - {"heads", "inspect", "profiles"}  # which need none
    modules = {name.partition(",")[0] for names in NEEDED.values() for name in names.split()}
    assert modules <= EXTRAS.keys()


@pytest.mark.parametrize("arguments", [["profiles"], ["inspect", BUNDLE], ["--help"]])
def test_commands_that_need_no_package_run_without_any(tiny_bundle: Path, arguments: list[str]) -> None:
    code = BLOCK + "from medusa_exporter.cli import main\nmain()"
    words = [str(tiny_bundle) if word == BUNDLE else word for word in arguments]
    environment = os.environ | {"BLOCKED": ",".join(EXTRAS)}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False, env=environment)
    assert done.returncode == ExitCode.SUCCESS, done.stderr
