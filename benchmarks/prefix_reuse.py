"""Compares second turns with and without prefix reuse: their answers, and the time to their first token.

Every prompt of two turns is answered by two engines in turns, one that reuses the rows of the first turn and one that
computes every prompt whole. In fp32 all tokens are equal. In other precisions the rows that were written while the
first answer was decoded may be rounded otherwise than those of a prefill. A difference is reported with its gap: how
much the logit of the token that was chosen without reuse exceeds that of the other one.

Then the time from the submission of a second turn to its first token is measured behind a conversation of about
`--shared` tokens: without reuse, with the rows still in the KV cache, and with rows that are copied back into it.

    python benchmarks/prefix_reuse.py BUNDLE --prompts mt_bench_dev.jsonl --limit 40 --max-tokens 32
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from medusa_exporter.answer_differences import first_difference, next_logits
from medusa_exporter.prompts import Turns, load_prompts
from medusa_runtime.engine import Engine
from medusa_runtime.loading import load_bundle
from medusa_runtime.results import GenerationResult
from medusa_runtime.sampling_params import SamplingParams

Messages = list[dict[str, str]]
BUDGET = 256 << 20  # bytes of the engine that reuses rows, in any precision
WITHOUT, IN_CACHE, COPIED = "without", "in the cache", "copied"


def user(text: str) -> dict[str, str]:
    """Return a user's message."""
    return {"role": "user", "content": text}


def second_turn(first: Messages, answer: str, text: str) -> Messages:
    """Return the messages of a second turn."""
    return [*first, {"role": "assistant", "content": answer}, user(text)]


def compare_answers(
    engines: dict[str, Engine], conversations: Sequence[Turns], params: SamplingParams
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answer both turns of every conversation with both engines, in an order that alternates.

    The second turn follows the first answer of the engine without reuse. First turns reuse rows too, where a chat
    template begins all prompts alike.

    Args:
        engines: The engines, by whether they reuse rows.
        conversations: Two texts each.
        params: The parameters.

    Returns:
        The figures, and the differences between answers.
    """
    differences: list[dict[str, Any]] = []
    reused, prompt_tokens = 0, 0
    for number, texts in enumerate(conversations):
        messages, order = [user(texts[0])], list(engines)[:: 1 if number % 2 else -1]
        for turn in (1, 2):
            results = {name: engines[name].generate(messages, params) for name in order}
            differences += difference(results, {"prompt": number, "turn": turn})
            messages = second_turn(messages, results[WITHOUT].text, texts[1])
        reused += results[IN_CACHE].cached_tokens
        prompt_tokens += len(results[IN_CACHE].prompt_token_ids)
        print(f"prompt {number + 1}/{len(conversations)}", file=sys.stderr, flush=True)
    different = [sum(found["turn"] == turn for found in differences) for turn in (1, 2)]
    figures = {"answers": len(conversations), "different_by_turn": different, "reused": reused / prompt_tokens}
    return figures, differences


def difference(results: dict[str, GenerationResult], where: dict[str, Any]) -> list[dict[str, Any]]:
    """Return how two answers to a prompt differ, as a list of one, or of none if they are equal.

    Args:
        results: The answers, by whether rows are reused.
        where: Describes the prompt.
    """
    without, having = results[WITHOUT], results[IN_CACHE]
    at = first_difference(list(without.token_ids), list(having.token_ids))
    if at is None:
        return []
    chosen = [ids[at] if at < len(ids) else None for ids in (without.token_ids, having.token_ids)]
    return [{**where, "token": at, "tokens": chosen, "before": [*without.prompt_token_ids, *without.token_ids[:at]]}]


def long_conversation(engine: Engine, conversations: Sequence[Turns], tokens: int) -> Messages:
    """Return a first turn of at most `tokens` tokens that is made of many texts, one at least."""
    texts: list[str] = []
    for text in (text for texts in conversations for text in texts):
        if texts and len(engine.encode([user(" ".join([*texts, text]))])) > tokens:
            break
        texts.append(text)
    return [user(" ".join(texts))]


def first_token_seconds(engine: Engine, messages: Messages) -> tuple[float, int]:
    """Return the seconds from submission to the first token, and how many tokens were reused."""
    started = perf_counter()
    with engine.submit(messages, SamplingParams(max_tokens=1, ignore_eos=True)) as handle:
        next(iter(handle))
        seconds = perf_counter() - started
        return seconds, handle.result().cached_tokens


def compare_times(
    engines: dict[str, Engine], conversations: Sequence[Turns], shared: int, repeats: int
) -> dict[str, Any]:
    """Time the first token of second turns behind a long first turn, in turns.

    Args:
        engines: The engines, by whether they reuse rows.
        conversations: Two texts each; the second ones are the second turns.
        shared: Tokens of the first turn and its answer, about.
        repeats: Second turns to time.
    """
    params, reusing = SamplingParams(max_tokens=32, ignore_eos=True), engines[IN_CACHE]
    first = long_conversation(reusing, conversations, shared - 32)
    answer = reusing.generate(first, params)
    seconds: dict[str, list[float]] = {WITHOUT: [], IN_CACHE: [], COPIED: []}
    cached: dict[str, list[int]] = {name: [] for name in seconds}
    turns: list[int] = []
    for number in range(repeats + 1):
        for name in list(seconds)[:: 1 if number % 2 else -1]:
            text = f"{name[0]}{number} {conversations[number % len(conversations)][1]}"  # no turn is asked twice
            messages = second_turn(first, answer.text, text)
            turns.append(len(reusing.encode(messages)))
            if name == COPIED:
                reusing.generate([user(f"{number} other words, which take the place of the rows")], params)
            elif name == IN_CACHE:
                reusing.generate(first, params)
            elapsed, reused = first_token_seconds(engines[WITHOUT if name == WITHOUT else IN_CACHE], messages)
            if number:  # the first round prepares
                seconds[name].append(elapsed)
                cached[name].append(reused)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "prompt_tokens": statistics.median(turns),
        "cached_tokens": {name: statistics.median(values) for name, values in cached.items()},
        "first_token_seconds": medians,
        "ratio": {name: medians[name] / medians[WITHOUT] for name in (IN_CACHE, COPIED)},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL file of prompts with two turns")
    parser.add_argument("--limit", type=int, default=40, help="number of prompts (default: %(default)s)")
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--profile", default="tree-4", help="tree of all answers (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--shared", type=int, default=1000, help="tokens before a timed turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="turns that are timed (default: %(default)s)")
    arguments = parser.parse_args()
    conversations = [turns for turns in load_prompts(arguments.prompts, None) if len(turns) >= 2]
    if not conversations:
        parser.error(
            f"{arguments.prompts} has no prompts with two turns; expected some, of the form {{'turns': [a, b]}}"
        )
    settings = {"backend": arguments.backend, "precision": arguments.precision}
    params = SamplingParams(max_tokens=arguments.max_tokens, profile=arguments.profile)
    with (
        Engine.load(arguments.bundle, prefix_cache_bytes=0, **settings) as without,
        Engine.load(arguments.bundle, prefix_cache_bytes=BUDGET, **settings) as reusing,
    ):
        engines = {WITHOUT: without, IN_CACHE: reusing}
        figures, differences = compare_answers(engines, conversations[: arguments.limit], params)
        times = compare_times(engines, conversations, arguments.shared, arguments.repeats)
    del without, reusing, engines
    gaps = []
    if differences:
        read = next_logits(load_bundle(arguments.bundle, **settings).decoder)
        for found in differences:
            first, second = found["tokens"]
            row = read(found.pop("before"))
            ended = first is None or second is None  # one of the answers ended earlier
            gaps.append(float("inf") if ended else float(row[first]) - float(row[second]))
            print({**found, "gap": gaps[-1]}, file=sys.stderr)
    print(json.dumps({**settings, "profile": arguments.profile, **figures, "largest_gap": max(gaps, default=0.0)}))
    print(json.dumps({**settings, **times}))


if __name__ == "__main__":
    main()
