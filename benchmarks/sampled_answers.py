"""Compares sampled answers of trees with those of plain decoding for the same seed, and times both in turns.

Every prompt is answered by plain decoding and by every tree, at every temperature, 0 (greedy) first, with parameters
that take turns: penalties, filters, stop strings; `--unmixed` leaves them out. In fp32 all tokens are equal. In other
precisions the number of rows in a step changes the rounding of the logits. A difference is reported with its gap: how
much the score of the race (log-weight minus log-noise, as `medusa_runtime.sampling.noise` draws) of the token that
plain decoding chose exceeds that of the tree's.

    python benchmarks/sampled_answers.py BUNDLE --prompts mt_bench_dev.jsonl --limit 40 --profile tree-4,tree-8,tree-16
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from medusa_exporter.answer_differences import first_difference, next_logits
from medusa_exporter.prompts import load_prompts
from medusa_runtime.engine import Engine
from medusa_runtime.loading import load_bundle
from medusa_runtime.results import GenerationResult
from medusa_runtime.sampling.noise import draw_key, exponentials
from medusa_runtime.sampling_params import SamplingParams

MIXED: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.95},
    {"top_k": 50, "repetition_penalty": 1.1},
    {"presence_penalty": 0.5, "frequency_penalty": 0.2, "stop": ["\n\n", "."]},
    {"min_p": 0.05, "min_tokens": 16, "stop": ["the"]},
)
UNFILTERED: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.1},
    {"stop": ["\n\n"]},
    {"frequency_penalty": 0.3},
)


@dataclass
class Totals:
    """Answers of one tree at one temperature, against plain decoding."""

    answers: int = 0
    different: int = 0
    tokens: int = 0
    steps: int = 0
    gaps: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # per token, of each answer
    speedups: list[float] = field(default_factory=list)  # over plain decoding, of each answer
    against_greedy: list[float] = field(default_factory=list)  # tokens per second over those at temperature 0

    def as_json(self) -> dict[str, Any]:
        """Return the figures; speeds and their ratios are medians over answers, without the prefill."""
        return {
            "answers": self.answers,
            "different": self.different,
            "largest_gap": max(self.gaps, default=0.0),
            "tokens_per_step": self.tokens / self.steps if self.steps else None,
            "tokens_per_second": float(1 / np.nanmedian(self.seconds)),
            "over_plain": float(np.nanmedian(self.speedups)),
            "over_greedy": float(np.nanmedian(self.against_greedy)),
        }


def parameters(temperature: float, number: int, max_tokens: int, mixed: bool) -> dict[str, Any]:
    """Return the parameters of prompt `number`; above temperature 1 there is neither top_k nor top_p nor min_p."""
    kinds = UNFILTERED if temperature > 1 else MIXED
    chosen = kinds[number % len(kinds)] if mixed else {}
    return {"temperature": temperature, "seed": 1000 + number, "max_tokens": max_tokens, **chosen}


def seconds_per_token(result: GenerationResult) -> float:
    """Return the duration of the steps per token that they gave."""
    tokens = len(result.token_ids) - 1
    return result.times.decode / tokens if tokens else float("nan")


class Comparison:
    """Answers prompts with one engine."""

    def __init__(self, engine: Engine, profiles: list[str], mixed: bool) -> None:
        self.engine, self.profiles, self.mixed = engine, profiles, mixed
        self.found: dict[tuple[float, str], Totals] = {}
        self._greedy: dict[tuple[int, str], float] = {}  # seconds per token, by prompt and tree

    def compare(self, prompt: str, number: int, temperature: float, max_tokens: int) -> Iterator[dict[str, Any]]:
        """Answer one prompt by plain decoding and by every tree, in an order that rotates; yield the differences."""
        values = parameters(temperature, number, max_tokens, self.mixed)
        names = ["plain", *self.profiles]
        order = names[number % len(names) :] + names[: number % len(names)]
        results = {name: self.engine.generate(prompt, SamplingParams(**values, profile=name)) for name in order}
        plain = results["plain"]
        for name in names:
            totals, result = self.found.setdefault((temperature, name), Totals()), results[name]
            totals.answers += 1
            totals.tokens += len(result.token_ids) - 1
            totals.steps += result.steps
            seconds = seconds_per_token(result)
            totals.seconds.append(seconds)
            totals.speedups.append(seconds_per_token(plain) / seconds)
            if temperature == 0:
                self._greedy[number, name] = seconds
            totals.against_greedy.append(self._greedy.get((number, name), float("nan")) / seconds)
            where = first_difference(list(plain.token_ids), list(result.token_ids))
            if where is not None:
                totals.different += 1
                yield {"prompt": number, "temperature": temperature, "profile": name, "token": where, **values} | {
                    "tokens": [
                        tokens[where] if where < len(tokens) else None for tokens in (plain.token_ids, result.token_ids)
                    ],
                    "before": [*plain.prompt_token_ids, *plain.token_ids[:where]],
                }


def gap(read: Any, difference: dict[str, Any]) -> float:
    """Return by how much the plain token's score exceeds the other's; only temperature is applied to the logits."""
    first, second = difference["tokens"]
    if first is None or second is None:
        return float("inf")
    row = read(difference["before"])
    logits = np.array([row[first], row[second]], dtype=np.float64)
    if difference["temperature"] == 0:
        return float(logits[0] - logits[1])
    noise = exponentials(np.array([first, second], np.uint32), draw_key(difference["seed"], 0, difference["token"]))
    scores = logits / difference["temperature"] - np.log(noise)
    return float(scores[0] - scores[1])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL file of prompts")
    parser.add_argument("--limit", type=int, default=40, help="number of prompts (default: %(default)s)")
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--profile", default="tree-4,tree-8,tree-16", help="trees (default: %(default)s)")
    parser.add_argument("--temperature", default="0,0.7,1.0,1.2", help="temperatures (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--unmixed", action="store_true", help="temperature and seed only, for a clear ratio of speeds")
    arguments = parser.parse_args()
    temperatures = [float(value) for value in arguments.temperature.split(",")]
    prompts = [turns[0] for turns in load_prompts(arguments.prompts, arguments.limit)]
    settings = {"backend": arguments.backend, "precision": arguments.precision}
    differences: list[dict[str, Any]] = []
    with Engine.load(arguments.bundle, prefix_cache_bytes=0, **settings) as engine:
        engine.warm_up()
        comparison, started = Comparison(engine, arguments.profile.split(","), not arguments.unmixed), perf_counter()
        for number, prompt in enumerate(prompts):
            for temperature in temperatures:
                differences += comparison.compare(prompt, number, temperature, arguments.max_tokens)
            print(f"prompt {number + 1}/{len(prompts)}, {perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    del engine
    if differences:
        read = next_logits(load_bundle(arguments.bundle, **settings).decoder)
        for difference in differences:
            distance = gap(read, difference)
            comparison.found[difference["temperature"], difference["profile"]].gaps.append(distance)
            print({**difference, "before": len(difference["before"]), "gap": distance}, file=sys.stderr)
    rows = [
        {"temperature": temperature, "profile": name, **totals.as_json()}
        for (temperature, name), totals in sorted(comparison.found.items())
    ]
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
