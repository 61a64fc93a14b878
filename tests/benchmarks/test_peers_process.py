"""The processes of peers.py, with this project's own decoder as two systems."""

from __future__ import annotations

import json
from pathlib import Path

import peers_process
import pytest
from medusa_runtime.bundle import Bundle
from peers_contenders import own_contenders
from peers_process import Worker, measure_in_turns

COMMON = {
    "prompts": [[5, 6, 7], [8, 9]],
    "prefills": [[5, 6, 7, 8]],
    "max_new_tokens": 4,
    "warm_up_tokens": 2,
    "attempts": 1,
    "threads": 1,
    "context": 16,
}


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_process, "REST", 0.0)


def test_systems_answer_each_prompt_in_turns(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, tree = own_contenders(Bundle.open(tiny_bundle), "", ["fp32"], ["tree-4"])
    order: list[tuple[str, str, int]] = []
    measure = Worker.measure

    def recorded(worker: Worker, kind: str, number: int) -> dict[str, object]:
        order.append((worker.name, kind, number))
        return measure(worker, kind, number)

    monkeypatch.setattr(Worker, "measure", recorded)
    first, second = measure_in_turns([(plain, []), (tree, [])], "python", COMMON)
    names = [name.removeprefix("medusa fp32").strip() or "plain" for name, _, _ in order]
    assert names == ["plain", "tree-4", "tree-4", "plain", "plain", "tree-4"]
    assert [number for _, _, number in order] == [0, 0, 1, 1, 0, 0]
    assert [len(one["answer"]) for one in first["prompts"]] == [4, 4]
    assert [one["answer"] for one in second["prompts"]] == [one["answer"] for one in first["prompts"]]
    assert second["prefills"][0]["prompt_tokens"] == 4
    assert first["peak_memory_bytes"] >= first["memory_bytes"]["rss"]
    json.dumps([first, second])


def test_an_ended_worker_is_reported(tiny_bundle: Path) -> None:
    [plain] = own_contenders(Bundle.open(tiny_bundle), "", ["fp32"], [])
    with Worker(plain, "python", COMMON, []) as worker:
        worker._process.kill()
        with pytest.raises(SystemExit, match="the worker of medusa fp32 ended with exit code -9"):
            worker.measure("prompts", 0)


def test_the_environment_of_a_system_is_set(tiny_bundle: Path) -> None:
    contenders = own_contenders(Bundle.open(tiny_bundle), "", ["fp32"], [])
    system = SystemWith(contenders[0].job | {"environment": {"MEDUSA_AMX": "7"}})
    with Worker(system, "python", COMMON, []) as worker:  # type: ignore[arg-type]
        with pytest.raises(SystemExit, match=r"ended with exit code 1:(?s:.*)MEDUSA_AMX is '7', expected 0"):
            worker.open()


class SystemWith:
    """A contender of ours with another job."""

    name, own = "medusa fp32", True

    def __init__(self, job: dict[str, object]) -> None:
        self.job = job
