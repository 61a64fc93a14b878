"""Builds the JSON of `medusa-export bench`: a result for each backend, profile, prompt length and output length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medusa_profiles.profile import TreeProfile
from medusa_runtime.bundle import Bundle

from medusa_exporter.answer_differences import is_exact, tolerances
from medusa_exporter.bench.conversations import BackendMeasurements
from medusa_exporter.bench.machine import describe_machine, versions
from medusa_exporter.bench.metrics import aggregate, by_category
from medusa_exporter.bench.schema import SCHEMA
from medusa_exporter.bench.timing import Measurement
from medusa_exporter.bench.worker import LoadedBackend


class Case(NamedTuple):
    """Prompt length and output length.

    Attributes:
        prompt_length: Tokens of each prompt; None for prompts as the file has them.
        max_new_tokens: Tokens of each answer; the maximum if `prompt_length` is None.
    """

    prompt_length: int | None
    max_new_tokens: int

    def describe(self) -> str:
        """Describe the case in a few words."""
        prompts = "prompts as they are" if self.prompt_length is None else f"prompts of {self.prompt_length} tokens"
        return f"{prompts}, {self.max_new_tokens} new tokens"


def document(
    bundle: Bundle, prompts: Path, count: int, threads: int | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the JSON document before anything is measured.

    Args:
        bundle: The bundle to measure.
        prompts: The file of prompts.
        count: The number of prompts that are used.
        threads: The requested number of threads, None for the default.
        settings: The options of the measurement.
    """
    return {
        "schema": SCHEMA,
        "machine": describe_machine(threads),
        "versions": versions(),
        "bundle": {"name": bundle.root.name, "model": bundle.model.name, "digest": bundle.manifest.digest},
        "prompts": {"file": prompts.name, "count": count, "turns": 0, "skipped": []},
        "settings": dict(settings),
        "backends": {},
        "failures": {},
        "results": [],
    }


def backend_facts(loaded: LoadedBackend) -> dict[str, Any]:
    """Describe a backend: device, library, precision, and the logit gap up to which two tokens are a tie."""
    facts = loaded.facts
    return {
        "device": facts.device,
        "driver": facts.driver,
        "capability": facts.capability,
        "library": facts.library,
        "version": facts.version,
        "weight_bytes": facts.weight_bytes,
        "kv_bytes_per_token": facts.kv_bytes_per_token,
        "memory_bytes_per_second": facts.bandwidth,
        "precision": loaded.precision,
        "context": loaded.context,
        **tolerances(is_exact(loaded.precision)),
    }


def case_results(
    case: Case,
    answers: Sequence[BackendMeasurements],
    backends: Mapping[str, LoadedBackend],
    trees: Sequence[TreeProfile],
    categories: Sequence[str | None],
    *,
    stop_at_eos: bool,
) -> list[dict[str, Any]]:
    """Return all results of one case, for plain decoding and for each tree on each backend.

    Backends are compared on the prompts that both have answered. Their speeds are over all prompts that each has
    answered, which are fewer for a backend that has failed.

    Args:
        case: Prompt length and output length.
        answers: The measurements of each question, by backend.
        backends: The backends, by name; the first is the one that others are compared with.
        trees: The profiles that were measured.
        categories: The category of each prompt, None for none.
        stop_at_eos: Whether end tokens end the answers.
    """
    of_backend = {name: [measured[name] for measured in answers if name in measured] for name in backends}
    modes = [TreeProfile.plain(), *trees]
    found = {
        (name, mode.name): {"backend": name, "precision": backends[name].precision, **case._asdict()}
        | aggregate(measurements, mode, stop_at_eos=stop_at_eos)
        | {"categories": by_category(measurements, mode, categories)}
        for name, measurements in of_backend.items()
        if measurements
        for mode in modes
    }
    plain = {name: found[name, modes[0].name]["tokens_per_second"] or 0.0 for name in of_backend if of_backend[name]}
    best = max(plain, key=lambda name: plain[name], default="")
    first = next(iter(backends))
    for (name, mode), result in found.items():
        rate, facts = result["tokens_per_second"], backends[name].facts
        result["best_plain"] = best
        result["speedup_over_best_plain"] = rate / plain[best] if rate and plain[best] else None
        read = facts.weight_bytes + facts.kv_bytes_per_token * (result["mean_past_length"] or 0.0)
        result["memory_bound_ms"] = 1e3 * read / facts.bandwidth if facts.bandwidth else None
        result["same_as_first_backend"] = None if name == first else _count_same(answers, first, name, mode)
    return list(found.values())


def _count_same(answers: Sequence[BackendMeasurements], first: str, name: str, mode: str) -> dict[str, int]:
    """Count the answers of both backends, and those of them that are identical."""
    both: list[tuple[Measurement, Measurement]] = [
        (measured[first], measured[name]) for measured in answers if {first, name} <= measured.keys()
    ]
    identical = sum(one.generation(mode).tokens == other.generation(mode).tokens for one, other in both)
    return {"answers": len(both), "identical": identical}
