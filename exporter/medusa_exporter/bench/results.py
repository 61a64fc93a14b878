"""The JSON of a run: one result for each backend, profile, prompt length and output length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from medusa_profiles.profile import TreeProfile
from medusa_runtime.bundle import Bundle

from medusa_exporter.answer_differences import is_exact, tolerances
from medusa_exporter.bench.conversations import BackendMeasurements
from medusa_exporter.bench.machine import machine, versions
from medusa_exporter.bench.metrics import aggregate, by_category
from medusa_exporter.bench.timing import Measurement
from medusa_exporter.bench.worker import LoadedBackend

SCHEMA = 1


class Case(NamedTuple):
    """What a cell has beside backend and profile. prompt_length: tokens; None: the prompts are as the file has them."""

    prompt_length: int | None
    max_new_tokens: int

    def describe(self) -> str:
        """Say it in a few words."""
        prompts = "prompts as they are" if self.prompt_length is None else f"prompts of {self.prompt_length} tokens"
        return f"{prompts}, {self.max_new_tokens} new tokens"


def document(
    bundle: Bundle, prompts: Path, count: int, threads: int | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run is of, with nothing measured yet. count: prompts that are asked. threads: as they were asked for."""
    return {
        "schema": SCHEMA,
        "machine": machine(threads),
        "versions": versions(),
        "bundle": {"name": bundle.root.name, "model": bundle.model.name, "digest": bundle.manifest.digest},
        "prompts": {"file": prompts.name, "count": count, "turns": 0, "skipped": []},
        "settings": dict(settings),
        "backends": {},
        "failures": {},
        "results": [],
    }


def backend_facts(opened: LoadedBackend) -> dict[str, Any]:
    """What ran: device, library, precision, and what counts as a tie there."""
    return {
        **asdict(opened.facts),
        "precision": opened.precision,
        "context": opened.context,
        **tolerances(is_exact(opened.precision)),
    }


def results(
    case: Case,
    answers: Sequence[BackendMeasurements],
    backends: Mapping[str, LoadedBackend],
    trees: Sequence[TreeProfile],
    categories: Sequence[str | None],
    *,
    ends: bool,
) -> list[dict[str, Any]]:
    """All results of one case. ends: whether answers end by themselves.

    What two backends share is told of the prompts that both answered; their rates are over all that each of them did,
    and one that has failed did fewer.
    """
    of_backend = {name: [turns[name] for turns in answers if name in turns] for name in backends}
    modes = [TreeProfile.plain(), *trees]
    found = {
        (name, mode.name): {"backend": name, "precision": backends[name].precision, **case._asdict()}
        | aggregate(turns, mode, ends=ends)
        | {"categories": by_category(turns, mode, categories)}
        for name, turns in of_backend.items()
        if turns
        for mode in modes
    }
    plain = {name: found[name, modes[0].name]["tokens_per_second"] or 0.0 for name in of_backend if of_backend[name]}
    best = max(plain, key=lambda name: plain[name], default="")
    first = next(iter(backends))
    for (name, mode), result in found.items():
        rate, facts = result["tokens_per_second"], backends[name].facts
        result["best_plain"] = best
        result["speedup_over_best"] = rate / plain[best] if rate and plain[best] else None
        read = facts.weights + facts.row * (result["kv_length"] or 0.0)
        result["bound_ms"] = 1e3 * read / facts.bandwidth if facts.bandwidth else None
        result["same_as_first"] = None if name == first else _same(answers, first, name, mode)
    return list(found.values())


def _same(answers: Sequence[BackendMeasurements], first: str, name: str, mode: str) -> dict[str, int]:
    """How many answers are token for token the first backend's, and of how many."""
    both: list[tuple[Measurement, Measurement]] = [
        (turns[first], turns[name]) for turns in answers if {first, name} <= turns.keys()
    ]
    equal = sum(one.run(mode).tokens == other.run(mode).tokens for one, other in both)
    return {"answers": len(both), "equal": equal}
