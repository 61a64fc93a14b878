"""Loads an engine from many threads with mixed requests, random cancels and deadlines, and checks every answer.

A fixed set of requests (greedy and sampled, penalties, filters, stop strings, several answers) is first answered by
plain decoding, one at a time. Then the threads ask for random ones of them, with the engine's tree: some requests are
cancelled after a random number of chunks, some are dropped, some have a short deadline. Every answer that is completed
must equal the first one, nothing may get stuck, and the memory must stay flat. Otherwise, or if no answer was compared,
the exit code is 1.

    python benchmarks/soak.py BUNDLE --minutes 10 --threads 16
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from medusa_runtime.engine import Engine
from medusa_runtime.errors import DeadlineError, QueueFullError, RequestCancelledError
from medusa_runtime.sampling_params import SamplingParams

PROMPTS = (
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "Name three prime numbers.",
    "Explain what a hash table is to a child, in one sentence.",
    "List the planets of the solar system.",
)
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.1, "logprobs": 2},
    {"temperature": 1.2, "n": 2},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "stop": [".", "\n"]},
    {"temperature": 0.9, "min_p": 0.05, "min_tokens": 8, "logit_bias": {11: 2.0}, "stop": ["the"]},
)
PATIENCE = 300  # seconds that no request may take
PREFIX_BYTES = 8 << 20  # for rows of earlier requests: enough to reuse some, less than the memory may grow by
MAX_GROWTH = 20.0  # MB between the first and the last third of the time, after a quarter of it


class Load:
    """The threads' shared state."""

    def __init__(self, engine: Engine, profile: str | None, max_tokens: int) -> None:
        self.engine, self.profile = engine, profile
        least = {"min_tokens": max_tokens}
        kinds = [{**kind, **(least if kind.get("min_tokens", 0) > max_tokens else {})} for kind in KINDS]
        self.cases = [
            (prompt, {"max_tokens": max_tokens, "seed": 7 * number, **kind})
            for number, (prompt, kind) in enumerate((prompt, kind) for prompt in PROMPTS for kind in kinds)
        ]
        self.expected = [self.tokens(engine.generate(p, SamplingParams(**v, profile="plain"))) for p, v in self.cases]
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lock = threading.Lock()

    @staticmethod
    def tokens(result: Any) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of all answers."""
        return tuple(choice.token_ids for choice in result.choices)

    def note(self, outcome: str) -> None:
        """Count an outcome."""
        with self.lock:
            self.outcomes[outcome] += 1

    def ask(self, seed: int, until: float) -> None:
        """Ask for random requests until the time is over."""
        rng = random.Random(seed)  # noqa: S311 -- for a load, not for secrets
        while time.monotonic() < until:
            which = rng.randrange(len(self.cases))
            prompt, values = self.cases[which]
            action = rng.choices(("complete", "cancel", "drop", "deadline"), (6, 2, 1, 1))[0]
            timeout = rng.uniform(0.01, 3) if action == "deadline" else None
            try:
                handle = self.engine.submit(prompt, SamplingParams(**values, profile=self.profile), timeout=timeout)
                if action in ("cancel", "drop"):
                    for _ in range(rng.randrange(6)):
                        if next(handle, None) is None:
                            break
                    if action == "cancel":
                        handle.cancel()
                    else:
                        del handle
                        self.note("dropped")
                        continue
                found = self.tokens(handle.result(PATIENCE))
            except (QueueFullError, RequestCancelledError, DeadlineError) as error:
                self.note(type(error).__name__)
                continue
            except BaseException as error:
                self.wrong.append(f"{self.cases[which]}: {error!r}")
                return
            self.note("completed")
            if found != self.expected[which]:
                self.wrong.append(f"{self.cases[which]}: {found} instead of {self.expected[which]}")


def gpu_megabytes(backend: str) -> float:
    """Return the GPU memory in use, as nvidia-smi reports it; 0 for a backend on the CPU."""
    if backend == "ort-cpu":
        return 0.0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def by_thirds(values: list[float]) -> list[float]:
    """Return the median of each third of the values, the first quarter left out."""
    thirds = np.array_split(np.array(values[len(values) // 4 :]), 3)
    return [round(float(np.median(third)), 1) for third in thirds if third.size]


def find_faults(load: Load, stuck: int, memory: dict[str, list[float]], max_growth: float) -> list[str]:
    """Return why a run does not pass; empty if it does.

    Args:
        load: What the threads have seen.
        stuck: Number of threads that have not ended.
        memory: Measured MB in the order of time, by the kind of memory.
        max_growth: MB that each kind may grow by.
    """
    found = [f"{len(load.wrong)} answers are wrong"] if load.wrong else []
    if stuck:
        found.append(f"{stuck} threads are stuck")
    if not load.outcomes["completed"]:
        found.append("no request was completed, so no answer was compared; expected some: allow more --minutes")
    for kind, values in memory.items():
        thirds = by_thirds(values)
        if len(thirds) < 3:
            found.append(f"{kind} was measured {len(values)} times, expected 4 or more")
        elif thirds[-1] - thirds[0] > max_growth:
            found.append(f"{kind} grew from {thirds[0]} to {thirds[-1]} MB, expected at most {max_growth:g} MB more")
    return found


def positive_number(text: str) -> float:
    """Return a finite number above 0; ValueError otherwise."""
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError
    return number


def positive_count(text: str) -> int:
    """Return a whole number above 0; ValueError otherwise."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main() -> None:
    """Run from the command line; exit code 1 if something was wrong, or nothing was tested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=positive_number, default=10)
    parser.add_argument("--threads", type=positive_count, default=16)
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--profile", help="tree (default: the engine's)")
    parser.add_argument("--max-tokens", type=positive_count, default=24)
    parser.add_argument("--max-growth", type=positive_number, default=MAX_GROWTH, help="MB that the memory may grow by")
    arguments = parser.parse_args()
    engine = Engine.load(
        arguments.bundle,
        backend=arguments.backend,
        precision=arguments.precision,
        max_waiting=2 * arguments.threads,
        prefix_cache_bytes=PREFIX_BYTES,
    )
    load = Load(engine, arguments.profile, arguments.max_tokens)
    until = time.monotonic() + 60 * arguments.minutes
    threads = [threading.Thread(target=load.ask, args=(seed, until), daemon=True) for seed in range(arguments.threads)]
    for thread in threads:
        thread.start()
    process, memory, began = psutil.Process(), [], time.monotonic()
    while any(thread.is_alive() for thread in threads) and time.monotonic() < until + PATIENCE:
        time.sleep(min(5, 6 * arguments.minutes))
        memory.append((process.memory_info().rss / 1e6, gpu_megabytes(arguments.backend), process.num_threads()))
        passed = time.monotonic() - began
        print(f"{passed:.0f} s, {memory[-1][0]:.0f} MB, {dict(load.outcomes)}", file=sys.stderr, flush=True)
    stuck = sum(thread.is_alive() for thread in threads)
    engine.close(timeout=PATIENCE)
    by_kind = {"rss": [resident for resident, *_ in memory], "gpu": [used for _, used, _ in memory]}
    faults = find_faults(load, stuck, by_kind, arguments.max_growth)
    print(
        json.dumps(
            {
                **load.outcomes,
                "wrong": len(load.wrong),
                "stuck": stuck,
                **{f"{kind}_mb_by_third": by_thirds(values) for kind, values in by_kind.items()},
                "threads": sorted({count for *_, count in memory}),
                "stats": {name: value for name, value in vars(engine.stats()).items() if not isinstance(value, tuple)},
                "faults": faults,
            },
            indent=2,
        )
    )
    for line in [*load.wrong[:10], *faults]:
        print(line, file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
