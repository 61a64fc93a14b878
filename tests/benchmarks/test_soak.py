"""benchmarks/soak.py passes only if it has tested something, and all of it was right."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soak

SECONDS = 120
FLAT = [900.0, 50.0, 100.0, 100.0, 101.0, 101.0, 102.0, 102.0]  # of which the first quarter does not count


def faults(completed: int = 5, wrong: tuple[str, ...] = (), stuck: int = 0, memory: Any = None) -> str:
    load = SimpleNamespace(outcomes=Counter(completed=completed), wrong=list(wrong))
    return "; ".join(soak.find_faults(load, stuck, {"rss": FLAT} if memory is None else memory, 20.0))  # type: ignore[arg-type]


def test_what_does_not_pass() -> None:
    assert faults() == ""
    assert "no answer was compared" in faults(completed=0)
    assert faults(wrong=("a", "b")) == "2 answers are wrong"
    assert faults(stuck=3) == "3 threads are stuck"
    grown = {"rss": FLAT, "gpu": [*FLAT[:-2], 130.0, 130.0]}
    assert faults(memory=grown) == "gpu grew from 100.0 to 130.0 MB, expected at most 20 MB more"
    assert faults(memory={"rss": FLAT[:2]}) == "rss was measured 2 times, expected 4 or more"
    assert faults(memory={"rss": FLAT[-4:]}) == ""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, soak.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_a_short_run_with_short_answers(tiny_bundle: Path) -> None:
    found = run(tiny_bundle, "--minutes", 0.05, "--threads", 3, "--max-tokens", 2, "--max-growth", 500)
    assert found.returncode == 0, found.stderr
    content = json.loads(found.stdout)
    assert content["completed"] > 0 and content["faults"] == []


@pytest.mark.parametrize(
    ("option", "value"),
    [*itertools.product(("--minutes", "--threads", "--max-tokens"), ("0", "-1", "nan", "inf", "x"))],
)
def test_numbers_are_positive(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "argv", ["soak.py", "bundle", option, value])
        soak.main()
    assert caught.value.code == 2
    assert f"argument {option}: invalid positive" in capsys.readouterr().err
