r"""Compares kinds of drafts by category of prompts: the trees, n-grams, and the choice of each step, in turns.

Every prompt is answered by plain decoding, by each tree, by n-grams alone and by `draft="auto"`, in an order that
rotates. The tables have tokens per second over those of the first tree (of plain decoding in a bundle without heads),
from total times, with 95% bootstrap intervals over prompts, once for all answers and once without those that repeat 20
tokens in a row, in which small models are caught in loops that n-grams predict well. The last column divides `auto` by
whichever fixed draft was the fastest of the category. Each category begins with newly loaded engines, which have
learned nothing; `auto` has one of its own, so that it learns only from its own answers.

    python benchmarks/drafts.py BUNDLE --precision w8a8 --prompts spec_bench_dev.jsonl --prompts humaneval_dev.jsonl \
        --limit 12 --max-tokens 160 --profile tree-4,tree-2
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
from medusa_runtime.engine import Engine
from medusa_runtime.results import GenerationResult
from medusa_runtime.sampling_params import AUTO, HEADS, NGRAM, SamplingParams

REPEAT = 20  # tokens
DRAWS = 2000  # resamples of an interval
PLAIN = "plain"


@dataclass
class Answer:
    """One answer of one contender.

    Args:
        tokens: Tokens behind the first one.
        seconds: Duration of its steps.
        equal: Whether all tokens are those of plain decoding.
        loops: Whether it has the same 20 tokens in a row twice.
    """

    tokens: int
    seconds: float
    equal: bool
    loops: bool


def repeats(ids: tuple[int, ...]) -> bool:
    """Return whether an answer has the same `REPEAT` tokens in a row twice."""
    runs = Counter(ids[at : at + REPEAT] for at in range(len(ids) - REPEAT + 1))
    return any(count > 1 for count in runs.values())


def contenders(profiles: list[str]) -> dict[str, SamplingParams]:
    """Return what is compared, by name; plain decoding first, then the trees."""
    fixed = {name: SamplingParams(profile=name, draft=HEADS) for name in (PLAIN, *profiles)}
    return fixed | {NGRAM: SamplingParams(draft=NGRAM), AUTO: SamplingParams(draft=AUTO)}


def read_prompts(files: list[Path], limit: int) -> dict[str, list[str]]:
    """Return the first user messages by category, at most `limit` of each, chosen with a fixed seed."""
    found: dict[str, list[str]] = {}
    for file in files:
        own = file.stem.removesuffix("_dev")
        for line in file.read_text(encoding="utf-8").splitlines():
            prompt = json.loads(line)
            name = prompt["category"] if own.startswith("spec_bench") or own == "code_edit" else own
            found.setdefault(name, []).append(prompt["turns"][0])
    for prompts in found.values():
        random.Random(0).shuffle(prompts)  # noqa: S311 -- a fixed order
    return {name: prompts[:limit] for name, prompts in found.items()}


def ratio(above: list[Answer], below: list[Answer]) -> tuple[float, float, float]:
    """Return tokens per second of some answers over those of others to the same prompts, and the interval's bounds."""
    tokens = np.array([[one.tokens for one in side] for side in (above, below)])
    seconds = np.array([[one.seconds for one in side] for side in (above, below)])
    picks = np.random.default_rng(0).integers(len(above), size=(DRAWS, len(above)))
    speeds = tokens[:, picks].sum(-1) / seconds[:, picks].sum(-1)  # (2, DRAWS)
    whole = tokens.sum(-1) / seconds.sum(-1)
    low, high = np.quantile(speeds[0] / speeds[1], (0.025, 0.975))
    return float(whole[0] / whole[1]), float(low), float(high)


def answer_all(
    engines: Mapping[str, Engine], prompts: list[str], kinds: dict[str, SamplingParams], most: int
) -> dict[str, list[Answer]]:
    """Answer the prompts with every contender, each on its engine, in turns."""
    found: dict[str, list[Answer]] = {name: [] for name in kinds}
    names, started = list(kinds), perf_counter()
    for number, prompt in enumerate(prompts):
        order = names[number % len(names) :] + names[: number % len(names)]
        results: dict[str, GenerationResult] = {
            name: engines[name].generate(prompt, replace(kinds[name], max_tokens=most)) for name in order
        }
        expected = results[PLAIN].token_ids
        if len(expected) < 2:  # no step was taken
            continue
        for name, result in results.items():
            ids = result.token_ids
            found[name].append(Answer(len(ids) - 1, result.times.decode, ids == expected, repeats(ids)))
        print(f"prompt {number + 1}/{len(prompts)}, {perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, dict[str, list[Answer]]], names: list[str], base: str) -> None:
    """Print a table with a row for each category."""
    print("| category | prompts | " + " | ".join(names) + " | auto over the best fixed one |")
    print("| --- " * (len(names) + 3) + "|")
    for category, answers in found.items():
        best = max((name for name in names if name != AUTO), key=lambda name: ratio(answers[name], answers[base])[0])
        pairs = [*((name, base) for name in names), (AUTO, best)]
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*ratio(answers[one], answers[other])) for one, other in pairs]
        cells[-1] += f", {best}"
        print(f"| {category} | {len(answers[base])} | " + " | ".join(cells) + " |")


def main() -> None:
    """Parse the command line, answer all prompts and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="Bundle folder.")
    parser.add_argument("--prompts", type=Path, action="append", required=True, help="JSON Lines file, repeatable.")
    parser.add_argument("--category", action="append", help="Measure only this category, repeatable.")
    parser.add_argument("--limit", type=int, default=12, help="Prompts of each category (default: %(default)s).")
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--precision", default="w8a8")
    parser.add_argument(
        "--profile", default="tree-4", help="Trees, the first is the base; '' for a bundle without heads."
    )
    parser.add_argument("--max-tokens", type=int, default=160)
    options = parser.parse_args()
    profiles = [name for name in options.profile.split(",") if name]
    kinds, found, base = contenders(profiles), {}, profiles[0] if profiles else PLAIN
    for category, prompts in read_prompts(options.prompts, options.limit).items():
        if options.category and category not in options.category:
            continue
        load = partial(Engine.load, options.bundle, backend=options.backend, precision=options.precision)
        with load() as choosing, load() as fixed:
            for engine in (choosing, fixed):
                engine.warm_up()
            print(f"== {category}", file=sys.stderr)
            engines = {name: choosing if name == AUTO else fixed for name in kinds}
            found[category] = answer_all(engines, prompts, kinds, options.max_tokens)
            drafts = choosing.stats().steps_by_draft
            print(category, dict(sorted(drafts.items(), key=lambda item: -item[1])), file=sys.stderr)
    different = {name: sum(not one.equal for answers in found.values() for one in answers[name]) for name in kinds}
    print(f"tokens/s over {base}; answers that differ from plain decoding's: {different}\n")
    table(found, list(kinds), base)
    print(f"\nwithout prompts whose answer repeats {REPEAT} tokens:\n")
    sound = {
        category: {
            name: [one for one, plain in zip(answers[name], answers[PLAIN], strict=True) if not plain.loops]
            for name in kinds
        }
        for category, answers in found.items()
    }
    table({category: answers for category, answers in sound.items() if answers[PLAIN]}, list(kinds), base)


if __name__ == "__main__":
    main()
