"""`medusa-export verify`: check that tree decoding gives the tokens of the model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from medusa_runtime.errors import BundleError, MedusaError
from medusa_runtime.facts import PLAIN
from medusa_runtime.loading import load_bundle

from medusa_exporter.answer_differences import is_exact, tolerances
from medusa_exporter.bench.conversations import PLAIN_TEXT
from medusa_exporter.bench.machine import versions
from medusa_exporter.built_in_prompts import BUILT_IN_PROMPTS
from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import (
    backend_option,
    choose_trees,
    digest_option,
    gpu_option,
    limit_option,
    precision_option,
    profiles_option,
    prompts_option,
    revision_option,
    turns_option,
)
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import Progress, note
from medusa_exporter.output_kinds import VERIFY
from medusa_exporter.prompts import load_prompts
from medusa_exporter.quality import as_table
from medusa_exporter.transformers_reference import TransformersReference
from medusa_exporter.verification import measurable_precisions, measure_precisions, verify_answers
from medusa_exporter.wording import counted


@click.command(name="verify", cls=Command, example="medusa-export verify bundle --profile tree-4,tree-8")
@click.argument("bundle", type=click.Path(path_type=Path))
@prompts_option
@click.option(
    "--model",
    metavar="MODEL",
    help="Compare plain decoding with this model too, run by transformers in fp32: a hub name, a folder or a "
    "GGUF file. Only graphs in fp32 can be compared with it.",
)
@revision_option
@profiles_option("check")
@backend_option()
@precision_option
@gpu_option
@digest_option
@limit_option
@click.option(
    "--max-new-tokens",
    default=64,
    show_default=True,
    type=click.IntRange(min=2),
    metavar="TOKENS",
    help="Maximum number of tokens of an answer.",
)
@turns_option
@json_option("the outcome")
def command(
    bundle: Path,
    file: Path | None,
    model: str | None,
    revision: str | None,
    profiles: tuple[str, ...],
    backend: str,
    precision: str | None,
    gpu: int,
    limit: int | None,
    max_new_tokens: int,
    turns: str,
    expected_digest: str | None,
    results: Results,
) -> None:
    """Check that every tree of BUNDLE gives the same tokens as plain decoding.

    Plain decoding is greedy, one token at a time. With --model it is itself compared with the original model. The first
    difference of each answer is printed with its position, the two tokens and the gap between their logits. A gap that
    rounding can explain is a tie and passes: at most 1e-3 in fp32, and 1% of the range of the logits in other
    precisions, where the number of rows in a step changes the rounding.

    If BUNDLE has both an fp32 graph and quantised graphs, each quantised graph is compared with fp32 on the same
    answers: the share of positions with the same most likely token, KL divergence and perplexity.

    A BUNDLE without heads has no trees, so it needs --model or several precisions.

    Exit code 1 if a difference is more than a tie.
    """
    if revision is not None and model is None:
        raise click.UsageError("--revision names a revision of --model, which is missing; give both or leave both out")
    results.check(VERIFY, inputs=[] if file is None else [file], bundle=bundle)
    progress = Progress()
    prompts = list(BUILT_IN_PROMPTS)[:limit] if file is None else load_prompts(file, limit)
    loaded = load_bundle(
        bundle, backend=backend, profile=PLAIN, precision=precision, gpu=gpu, expected_digest=expected_digest
    )
    if not loaded.prompt_encoder.has_chat_template:
        note(PLAIN_TEXT)
    exact = is_exact(loaded.decoder.backend.precision)
    if model is not None and not exact:
        one = loaded.decoder.backend.precision
        remedy = "leave out one of the two" if precision else "leave --model out, or build the bundle with fp32 too"
        raise click.UsageError(f"--model is compared with fp32, not with {one}; {remedy}")
    trees = choose_trees(loaded.bundle, profiles)
    if not trees and model is None and not measurable_precisions(loaded.bundle, backend):
        remedy = (
            "compare plain decoding with the original model: --model MODEL"
            if exact
            else f"build it with fp32 too, which {loaded.decoder.backend.precision} is then compared with"
        )
        raise BundleError(f"{bundle} has no heads, so there is no tree to check; {remedy}")
    found = verify_answers(
        loaded,
        trees,
        prompts,
        max_new_tokens=max_new_tokens,
        first_turn_only=turns == "first",
        reference=None if model is None else TransformersReference(model, loaded.bundle.model, revision),
        report=progress.report,
        show=results.echo,
    )
    qualities = measure_precisions(loaded.bundle, backend, gpu, found.texts, progress.report)
    content = {
        "bundle": {"name": loaded.bundle.root.name, "digest": loaded.bundle.manifest.digest},
        "model": model,
        "revision": revision,
        "versions": versions(),
        "profiles": [tree.name for tree in trees],
        "backend": backend,
        "precision": loaded.decoder.backend.precision,
        **tolerances(exact),
        "answers": len(found.texts),
        "tokens": found.tokens,
        "skipped": found.skipped,
        "passed": not found.failures,
        "differences": [one.as_json() for one in found.differences],
        "quality": {name: asdict(quality) for name, quality in qualities.items()},
    }
    results.write(VERIFY, content)
    if qualities:
        results.echo(as_table(qualities))
    compared = _compared(len(trees), model)
    answers, tokens = counted(len(found.texts), "answer"), counted(found.tokens, "token")
    summary = f"{answers} of {tokens} in all, {compared}: "
    if found.skipped:
        summary = f"{found.skipped} of {counted(len(prompts), 'prompt')} skipped, too long for the context; {summary}"
    if found.failures:
        raise MedusaError(summary + found.describe())
    results.echo(summary + (found.describe() if trees or model is not None else "nothing to compare them with"))


def _compared(trees: int, model: str | None) -> str:
    """Say what was compared with what."""
    of_model = "" if model is None else f"against {model} in transformers"
    if trees:
        return f"{counted(trees, 'tree')} against plain decoding{of_model and f', and that {of_model}'}"
    return f"plain decoding {of_model or 'of a bundle without heads'}"
