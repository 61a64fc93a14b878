"""JSON as `medusa-export bench` writes it, from scripted answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from medusa_exporter.bench.results import Case, backend_facts, case_results
from medusa_exporter.bench.timing import Measurement, Question, TimedAnswer
from medusa_exporter.bench.worker import LoadedBackend
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends.base import BackendFacts

TREES = (TreeProfile("pair", ((0,),)), TreeProfile("chain-2", ((0,), (0, 0))))
FACTS = BackendFacts("H100", "580.65 (CUDA 13.0)", "9.0", "onnxruntime", "1.31.0", 270_000_000, 23040, 2.9e12)


def opened(**changes: Any) -> LoadedBackend:
    return LoadedBackend(replace(FACTS, **changes), "fp16", 4096)


def turn(length: int, ms: float, new: int = 13) -> Measurement:
    """Steps of `ms` milliseconds; the pair keeps two tokens a step, the chain three."""

    def run(kept: int, factor: float) -> TimedAnswer:
        steps = (new - 1) // kept
        return TimedAnswer(tuple(range(new)), (kept,) * steps, length / 1e5, (ms * factor / 1e3,) * steps, 1e-5)

    question = Question(1, 1, (5,) * length, new, stop_at_eos=False)
    return Measurement(question, run(1, 1.0), {"pair": run(2, 1.25), "chain-2": run(3, 1.2)})


def content(speeds: dict[str, float], lengths: tuple[int | None, ...] = (100, 400), **facts: Any) -> dict[str, Any]:
    """speeds: by backend the milliseconds of a plain step behind 100 rows; it takes a quarter more behind 400."""
    backends = {name: opened(**facts) for name in speeds}
    found = []
    for length in lengths:
        rows = 100 if length is None else length
        answers = {name: turn(rows, ms * (1 + (rows - 100) / 1200)) for name, ms in speeds.items()}
        found += case_results(Case(length, 13), [answers], backends, TREES, [None], stop_at_eos=False)
    return {
        "schema": 2,
        "machine": {"cpu": "Xeon", "cores": 8, "processors": 16, "threads": 8, "platform": "Linux"},
        "versions": {"python": "3.11.7"},
        "bundle": {"name": "bundle", "model": "tiny", "digest": "ab" * 32},
        "prompts": {"file": "prompts.jsonl", "count": 1, "turns": 2, "skipped": []},
        "settings": {"accept": "greedy", "forced": None},
        "backends": {name: backend_facts(one) for name, one in backends.items()},
        "failures": {},
        "results": found,
    }


def written(file: Path, what: object) -> Path:
    file.write_text(json.dumps(what))
    return file
