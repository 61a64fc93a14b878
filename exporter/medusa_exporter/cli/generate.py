"""`medusa-export generate`: answer one prompt, streamed."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from medusa_profiles.profile import TreeProfile
from medusa_runtime.accept import ACCEPT_RULES
from medusa_runtime.backends import BACKENDS
from medusa_runtime.engine import Engine
from medusa_runtime.generation import Generation

from medusa_exporter.cli.options import digest_option, gpu_option, length_option, precision_option
from medusa_exporter.verify import first_difference


@click.command(name="generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--profile", help="A tree of the bundle, or 'plain'. Default: what suits the precision.")
@click.option("--backend", default="ort-cpu", show_default=True, type=click.Choice(list(BACKENDS)))
@precision_option
@digest_option
@click.option(
    "--threads", type=click.IntRange(min=1), help="Default: one per physical core, within a container's quota."
)
@length_option
@gpu_option
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--raw", is_flag=True, help="Take PROMPT as it stands, without the chat template.")
@click.option("--chat-template", help="The name of one of the model's own chat templates that the bundle holds.")
@click.option("--compare", is_flag=True, help="Answer by plain decoding too, and tell both speeds apart.")
@click.option(
    "--accept",
    default="greedy",
    show_default=True,
    type=click.Choice(list(ACCEPT_RULES)),
    help="'greedy' gives the model's own tokens; 'typical' (the paper's rule) is LOSSY.",
)
def command(
    bundle: Path,
    prompt: str,
    profile: str | None,
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
) -> None:
    """Answer PROMPT with BUNDLE, streamed, and end with tokens, steps and speed.

    PROMPT may be - for standard input.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    engine = Engine.load(
        bundle,
        backend=backend,
        profile=profile,
        precision=precision,
        threads=threads,
        max_length=max_length,
        accept=accept,
        gpu=gpu,
        chat_template=chat_template,
        expected_digest=expected_digest,
    )
    answer = engine.generate(prompt, stream=True, max_new_tokens=max_new_tokens, raw=raw)
    for piece in answer:
        click.echo(piece, nl=False)
    click.echo()
    note = "" if accept == "greedy" else f" (accept rule {accept}: lossy, not the model's own tokens)"
    click.echo(_figures(engine.decoder.profile.name, answer) + note, err=True)
    if not compare:
        return
    engine.decoder.set_profile(TreeProfile.plain())
    plain = engine.generate(prompt, stream=True, max_new_tokens=max_new_tokens, raw=raw)
    for _piece in plain:
        pass
    click.echo(_figures("plain", plain), err=True)
    where = first_difference(plain.tokens, answer.tokens)
    same = "the same tokens" if where is None else f"DIFFERENT tokens from the answer's token {where} on"
    speedup = plain.seconds / answer.seconds if answer.seconds else float("nan")
    click.echo(f"{same}; {speedup:.2f} times as fast as plain decoding (one answer: `bench` measures)", err=True)


def _figures(name: str, answer: Generation) -> str:
    return (
        f"[{name}] {len(answer.tokens)} tokens, {answer.steps} steps, {answer.tokens_per_step:.2f} tokens/step, "
        f"{answer.tokens_per_second:.1f} tokens/s; prompt of {answer.prompt_tokens} tokens in "
        f"{answer.prefill_seconds:.2f} s"
    )
