"""Prints the answers of an engine, and describes them for people and for programs."""

from __future__ import annotations

import contextlib
from typing import Any

from medusa_runtime.handle import RequestHandle
from medusa_runtime.results import Choice, GenerationResult, TokenLogprobs
from medusa_runtime.sampling_params import DRAFTS

from medusa_exporter.answer_differences import first_difference
from medusa_exporter.cli.results import Results
from medusa_exporter.wording import counted


def print_answers(handle: RequestHandle, count: int, results: Results) -> GenerationResult:
    """Print a request's answers and return its result.

    A single answer is printed while it is generated; several are printed whole, each below a line with its number.
    What was printed stays when the request ends with an error, or is interrupted.
    """
    if count == 1:
        try:
            for chunk in handle:
                results.echo(chunk.text, newline=False)
        except BaseException:
            with contextlib.suppress(OSError):  # a closed pipe
                results.echo("")
            raise
        results.echo("")
        return handle.result()
    texts: list[str] = []
    for chunk in handle:
        texts.append(chunk.text)
        if chunk.finish_reason is not None:
            results.echo(f"--- answer {chunk.index + 1} of {count} ---\n{''.join(texts)}")
            texts = []
    return handle.result()


def describe(result: GenerationResult) -> str:
    """Return a line with the number of tokens, and of steps and their speed where the answers needed any."""
    usage, steps = result.usage, sum(choice.steps for choice in result.choices)
    figures = [counted(usage.completion_tokens, "token")]
    if steps:
        figures += [counted(steps, "step"), f"{result.tokens_per_step:.2f} tokens/step"]
    if speed := tokens_per_second(result):
        figures.append(f"{speed:.1f} tokens/s")
    prompt = counted(usage.prompt_tokens, "token")
    return f"[{result.profile}] {', '.join(figures)}; prompt of {prompt} in {result.times.prefill:.2f} s"


def describe_comparison(plain: GenerationResult, result: GenerationResult) -> str:
    """Return a line that compares answers with those of plain decoding."""
    differing = [
        (index, where)
        for index, pair in enumerate(zip(plain.choices, result.choices, strict=True))
        if (where := first_difference(pair[0].token_ids, pair[1].token_ids)) is not None
    ]
    same = "the same tokens"
    if differing:
        index, where = differing[0]
        which = "the answer" if len(result.choices) == 1 else f"answer {index + 1}"
        same = f"DIFFERENT tokens from {which}'s token {where} on"
    speed, plain_speed = tokens_per_second(result), tokens_per_second(plain)
    if not speed or not plain_speed:
        return f"{same}; too few of them to compare the speed"
    measures = "one request" if result.profile in DRAFTS else "one request: `bench` measures"
    return f"{same}; {speed / plain_speed:.2f} times as fast as plain decoding ({measures})"


def tokens_per_second(result: GenerationResult) -> float:
    """Return the tokens per second of decoding, without the prefill and each answer's first token."""
    tokens = sum(len(choice.token_ids) - 1 for choice in result.choices if choice.token_ids)
    return tokens / result.times.decode if result.times.decode else 0.0


def as_json(result: GenerationResult) -> dict[str, Any]:
    """Return a result as JSON values."""
    times = result.times
    return {
        "profile": result.profile,
        "acceptance": result.acceptance,
        "seed": result.seed,
        "choices": [_choice_as_json(choice) for choice in result.choices],
        "usage": {
            "prompt_tokens": result.usage.prompt_tokens,
            "completion_tokens": result.usage.completion_tokens,
            "total_tokens": result.usage.total_tokens,
        },
        "times": {"queue": times.queue, "prefill": times.prefill, "decode": times.decode, "total": times.total},
        "tokens_per_step": result.tokens_per_step,
        "tokens_per_second": tokens_per_second(result),
    }


def _choice_as_json(choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": choice.text,
        "token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "logprobs": None if choice.logprobs is None else [_logprobs_as_json(one) for one in choice.logprobs],
        "steps": choice.steps,
        "accepted_by_depth": list(choice.accepted_by_depth),
        "drafted_by_depth": list(choice.drafted_by_depth),
        "decode_seconds": choice.decode_seconds,
    }


def _logprobs_as_json(found: TokenLogprobs) -> dict[str, Any]:
    top = [{"token_id": one.token_id, "logprob": one.logprob} for one in found.top]
    return {"token_id": found.token_id, "logprob": found.logprob, "top": top}
