"""Workers that run in the process of the test, so that a test can replace parts of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.bench import worker
from medusa_exporter.cli import main


class SameProcess(Executor):
    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*arguments, **named))
        except Exception as error:
            done.set_exception(error)
        return done


def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "start_process", SameProcess)
    monkeypatch.setattr(worker, "_decoders", {})


def prompts_file(folder: Path) -> Path:
    """Four prompts: one of two turns, and one that does not fit the context."""
    file = folder / "prompts.jsonl"
    lines = [["What is a tree?", "Write code"], ["Hello there"], ["word " * 600], ["a b c"]]
    file.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in lines))
    return file


def run(*arguments: object) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)
