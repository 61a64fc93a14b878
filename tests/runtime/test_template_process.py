"""The process that renders chat templates: one for all threads, started anew when it has died, gone at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import spawn
from pathlib import Path

import psutil
import pytest
from medusa_runtime import template_process, template_worker
from medusa_runtime.chat_template import ChatTemplate
from medusa_runtime.errors import PromptError, TemplateProcessError
from medusa_runtime.template_process import TEMPLATE_PROCESS, TemplateProcess

MESSAGES = [{"role": "user", "content": "Hi"}]
ECHO = {"source": "{{ x }}", "names": {"x": "answer"}}


@pytest.fixture
def process():
    made = TemplateProcess()
    yield made
    made.stop()


def test_threads_take_turns(process: TemplateProcess) -> None:
    def ask(number: int) -> str:
        return process.render({"source": "{{ x }}", "names": {"x": number}})

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(200))) == list(map(str, range(200)))


def test_one_that_has_died_is_started_anew(process: TemplateProcess) -> None:
    assert process.render(ECHO) == "answer"
    before = process._process
    os.kill(before.pid, signal.SIGKILL)
    before.wait()
    assert process.render(ECHO) == "answer"
    assert process._process.pid != before.pid


def test_one_that_dies_at_work_is_an_error_and_the_next_is_answered(process: TemplateProcess) -> None:
    process.render(ECHO)
    spinning = {"source": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "names": {}}
    threading.Timer(0.3, os.kill, (process._process.pid, signal.SIGKILL)).start()
    with pytest.raises(TemplateProcessError, match="ended with code -9, perhaps for want of memory"):
        process.render(spinning)
    with pytest.raises(PromptError, match="takes more than 2 seconds of processor time"):
        process.render(spinning)
    assert process.render(ECHO) == "answer"


def test_an_interrupted_answer_is_not_taken_for_the_next_one(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.render(ECHO)
    receive = template_worker.read_message

    def interrupted(pipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(template_worker, "read_message", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.render({"source": "another", "names": {}})
    monkeypatch.setattr(template_worker, "read_message", receive)
    assert process.render(ECHO) == "answer"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such signals there")
def test_a_signals_handler_that_renders_while_its_thread_does_is_refused(process: TemplateProcess) -> None:
    process.render(ECHO)
    said: list[str] = []

    def handler(*_: object) -> None:
        try:
            said.append(process.render(ECHO))
        except PromptError as error:
            said.append(str(error))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        slow = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        with pytest.raises(PromptError, match="2 seconds of processor time"):
            process.render({"source": slow, "names": {}})
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(said) == 1 and "when a signal handler interrupted it" in said[0]
    assert process.render(ECHO) == "answer"


def test_an_interrupt_as_the_clock_starts_leaves_no_clock(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(threading.Timer):
        def start(self) -> None:
            super().start()
            raise KeyboardInterrupt

    monkeypatch.setattr(threading, "Timer", Interrupted)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        process.render(ECHO)
    monkeypatch.undo()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()
    assert process.render(ECHO) == "answer"


def test_the_clock_ends_what_takes_no_processor_time(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    process.render(ECHO)
    os.kill(process._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(template_process, "SECONDS", 0.5)
    with pytest.raises(PromptError, match=r"takes more than 0\.5 seconds"):
        process.render(ECHO)


def test_a_request_that_is_too_long_is_not_sent(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "MAX_BYTES", 1000)
    with pytest.raises(PromptError, match=r"it has 10\d\d bytes, expected at most 1000; shorten it"):
        process.render({"source": "{{ x }}", "names": {"x": "answer" * 170}})
    assert process._process is None
    assert process.render(ECHO) == "answer"


@pytest.mark.parametrize("answer", [b"", b"\0", b"\xff" * 8, b"\0" * 8, b"\0" * 7 + b"\3{x}"])
def test_a_process_that_answers_otherwise(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    code = f"import sys; sys.stdin.buffer.read(8); sys.stdout.buffer.write({answer!r})"
    monkeypatch.setattr(template_process, "_START", code)
    with pytest.raises(PromptError, match="the process that renders it"):
        process.render(ECHO)


def test_no_interpreter(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "get_executable", lambda: "/nonexistent/python")
    with pytest.raises(PromptError, match=r"cannot be started: .*/nonexistent/python.*multiprocessing\.set_executable"):
        process.render(ECHO)


def test_what_it_gives_up_and_what_it_inherits(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "secret")
    with Path("/dev/null").open("rb") as file:
        os.set_inheritable(file.fileno(), True)
        process.render(ECHO)
        proc = Path(f"/proc/{process._process.pid}")
        limits = (proc / "limits").read_text()
        assert [limits.count(f"Max {name}") for name in ("address space", "file size")] == [1, 1]
        for line in limits.splitlines():
            if line.startswith("Max address space"):
                assert line.split()[3:5] == [str(template_worker.MEMORY)] * 2
            if line.startswith("Max file size"):
                assert line.split()[3:5] == ["0", "0"]
        assert b"SECRET" not in (proc / "environ").read_bytes()
        opened = {str(one.readlink()) for one in (proc / "fd").iterdir()}
        assert sum(name.startswith("pipe:") for name in opened) == 2
        assert len(opened) == 3  # both pipes, and /dev/null for errors


def test_a_forked_process_has_its_own(tmp_path: Path) -> None:
    """Both sides ask while the other does; neither sees the other's answers."""
    script = """
import os, sys
from medusa_runtime.template_process import TEMPLATE_PROCESS
ask = lambda x: TEMPLATE_PROCESS.render({"source": "{{ x }}", "names": {"x": x}})
assert ask(1) == "1"
parent = TEMPLATE_PROCESS._process.pid
child = os.fork()
for number in range(200):
    x = number + 1000 * (child == 0)
    assert ask(x) == str(x), x
assert (TEMPLATE_PROCESS._process.pid == parent) == (child != 0)
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], check=False, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)", "os._exit(0)"])
def test_nothing_is_left_behind(end: str) -> None:
    script = f"""
import json, os
from medusa_runtime.template_process import TEMPLATE_PROCESS
TEMPLATE_PROCESS.render({{"source": "x", "names": {{}}}})
print(json.dumps(TEMPLATE_PROCESS._process.pid), flush=True)
{end}
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    pid = json.loads(done.stdout)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_templates_share_the_process() -> None:
    first, second = ChatTemplate("1{{ messages[0].content }}", {}), ChatTemplate("2", {})
    pid = TEMPLATE_PROCESS._process.pid
    assert (first.render(MESSAGES), second.render(MESSAGES)) == ("1Hi", "2")
    assert TEMPLATE_PROCESS._process.pid == pid
