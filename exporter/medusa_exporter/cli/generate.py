"""`medusa-export generate`: answer one prompt with a bundle."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click
from medusa_profiles.catalogue import profile_from_file
from medusa_profiles.profile import TreeProfile
from medusa_runtime.accept import ACCEPT_RULES
from medusa_runtime.engine import Engine
from medusa_runtime.generation import Generation

from medusa_exporter.answer_differences import first_difference
from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import (
    backend_option,
    calibration_option,
    digest_option,
    gpu_option,
    length_option,
    precision_option,
    threads_option,
)
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import note
from medusa_exporter.output_kinds import SUMMARIES

KIND = SUMMARIES["generate"]


@click.command(
    name="generate", cls=Command, example='medusa-export generate bundle "Why is the sky blue?" --profile tree-4'
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option(
    "--profile",
    metavar="NAME|FILE",
    help="Tree to decode with: a name in the bundle, e.g. tree-4, a .toml file, or plain for one token at a time. "
    "Default: the fastest on this machine if `medusa-export calibrate` has measured it, otherwise the one that the "
    "bundle names for the precision.",
)
@calibration_option
@backend_option()
@precision_option
@digest_option
@threads_option
@length_option
@gpu_option
@click.option(
    "--max-new-tokens",
    default=256,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Maximum number of tokens of the answer.",
)
@click.option("--raw", is_flag=True, help="Use PROMPT as it is, without the chat template.")
@click.option(
    "--chat-template",
    metavar="NAME",
    help="Chat template to use, by its name in the bundle. Default: the one that the bundle was built with.",
)
@click.option("--compare", is_flag=True, help="Answer with plain decoding too, then compare tokens and speed.")
@click.option(
    "--accept",
    default="greedy",
    show_default=True,
    type=click.Choice(list(ACCEPT_RULES)),
    help="Rule that accepts candidates. greedy gives exactly the tokens of greedy decoding; typical, the rule of the "
    "Medusa paper, is lossy: it gives other tokens.",
)
@json_option("the answer and its speed")
def command(
    bundle: Path,
    prompt: str,
    profile: str | None,
    calibration: Path | None,
    backend: str,
    precision: str | None,
    threads: int | None,
    max_length: int | None,
    gpu: int,
    max_new_tokens: int,
    raw: bool,
    chat_template: str | None,
    compare: bool,
    accept: str,
    expected_digest: str | None,
    results: Results,
) -> None:
    """Answer PROMPT with BUNDLE and print the answer while it is generated.

    PROMPT is the text of one user message; - reads it from standard input. The number of tokens and steps and the speed
    go to standard error.
    """
    results.check(KIND, bundle=bundle)
    prompt = _as_unicode(sys.stdin.read() if prompt == "-" else prompt)
    engine = Engine.load(
        bundle,
        backend=backend,
        profile=profile and (profile_from_file(profile) or profile),
        precision=precision,
        threads=threads,
        max_length=max_length,
        accept=accept,
        gpu=gpu,
        chat_template=chat_template,
        expected_digest=expected_digest,
        calibration=calibration,
    )
    answer = engine.generate(prompt, stream=True, max_new_tokens=max_new_tokens, raw=raw)
    pieces = []
    for piece in answer:
        pieces.append(piece)
        results.echo(piece, newline=False)
    results.echo("")
    name = engine.decoder.profile.name
    remark = "" if accept == "greedy" else f" (accept rule {accept}: lossy, not the tokens of greedy decoding)"
    note(_describe(name, answer) + remark)
    content: dict[str, Any] = {"text": "".join(pieces), "accept": accept, "profile": name, **_figures(answer)}
    if compare:
        engine.decoder.set_profile(TreeProfile.plain())
        plain = engine.generate(prompt, stream=True, max_new_tokens=max_new_tokens, raw=raw)
        for _piece in plain:
            pass
        note(_describe("plain", plain))
        note(_compared(plain, answer))
        content["plain"] = _figures(plain)
        content["same_tokens"] = plain.tokens == answer.tokens
    results.write(KIND, content)


def _as_unicode(text: str) -> str:
    """Decode UTF-8 that Python has kept as single bytes, because the locale of the terminal is another one."""
    try:
        return os.fsencode(text).decode() if any("\udc80" <= character <= "\udcff" for character in text) else text
    except UnicodeError:
        return text  # not UTF-8: the engine refuses it


def _compared(plain: Generation, answer: Generation) -> str:
    where = first_difference(plain.tokens, answer.tokens)
    same = "the same tokens" if where is None else f"DIFFERENT tokens from the answer's token {where} on"
    speedup = plain.seconds / answer.seconds if answer.seconds else float("nan")
    return f"{same}; {speedup:.2f} times as fast as plain decoding (one answer: `bench` measures)"


def _figures(answer: Generation) -> dict[str, Any]:
    return {
        "tokens": list(answer.tokens),
        "steps": answer.steps,
        "tokens_per_step": answer.tokens_per_step,
        "tokens_per_second": answer.tokens_per_second,
        "seconds": answer.seconds,
        "prompt_tokens": answer.prompt_tokens,
        "prefill_seconds": answer.prefill_seconds,
    }


def _describe(name: str, answer: Generation) -> str:
    return (
        f"[{name}] {len(answer.tokens)} tokens, {answer.steps} steps, {answer.tokens_per_step:.2f} tokens/step, "
        f"{answer.tokens_per_second:.1f} tokens/s; prompt of {answer.prompt_tokens} tokens in "
        f"{answer.prefill_seconds:.2f} s"
    )
