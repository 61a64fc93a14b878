"""`medusa-export verify`: check that a bundle gives the model's own tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from medusa_runtime.backends import BACKENDS, load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.engine import Engine
from medusa_runtime.errors import MedusaError
from medusa_runtime.facts import PLAIN

from medusa_exporter.bench.conversations import PLAIN_TEXT, Skipped, converse
from medusa_exporter.bench.machine import versions
from medusa_exporter.bench.timing import Measurement, TimedDecoder
from medusa_exporter.cli.options import choose_trees, digest_option, gpu_option, precision_option, split_commas
from medusa_exporter.files import write_json
from medusa_exporter.output_kinds import VERIFY
from medusa_exporter.overwrite_check import check_output_file
from medusa_exporter.precisions import FORMATS
from medusa_exporter.prompts import load_prompts
from medusa_exporter.quality import Quality, Text, as_table, measure
from medusa_exporter.verify import (
    PROMPTS,
    Difference,
    Reference,
    compare,
    is_exact,
    next_logits,
    tolerances,
)


@click.command(name="verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines with 'turns'. Default: a handful of built-in prompts.",
)
@click.option("--model", help="Compare with this model, run by transformers in fp32: hub name, folder or GGUF file.")
@click.option(
    "--profile", "profiles", multiple=True, callback=split_commas, help="Trees to check. Default: all of the bundle."
)
@click.option("--backend", default="ort-cpu", show_default=True, type=click.Choice(list(BACKENDS)))
@precision_option
@gpu_option
@digest_option
@click.option("--limit", type=click.IntRange(min=1), help="At most so many prompts.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=2), help="Per answer.")
@click.option("--turns", default="all", show_default=True, type=click.Choice(["all", "first"]))
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the outcome there too.")
def command(
    bundle: Path,
    file: Path | None,
    model: str | None,
    profiles: tuple[str, ...],
    backend: str,
    precision: str | None,
    gpu: int,
    limit: int | None,
    max_new_tokens: int,
    turns: str,
    output: Path | None,
    expected_digest: str | None,
) -> None:
    """Check that every tree gives the tokens of BUNDLE's plain decoding, and these, with --model, the model's own.

    Each answer's first difference is printed with its position, both tokens and their gap in logits. Exit code 1 when
    a gap is more than a tie: 1e-3 logits in fp32, 1% of the row's range in other precisions (there another number of
    rows rounds in another way; and the model's own tokens are not promised, so --model needs fp32).

    Where BUNDLE has fp32 and quantised graphs, each of these is then compared with fp32 on the same answers: how often
    both find the same token likeliest, KL divergence, perplexity.
    """
    if output is not None:
        check_output_file(output, VERIFY, inputs=[] if file is None else [file], bundle=bundle)
    prompts = list(PROMPTS)[:limit] if file is None else load_prompts(file, limit)
    engine = Engine.load(
        bundle, backend=backend, profile=PLAIN, precision=precision, gpu=gpu, expected_digest=expected_digest
    )
    if not engine.prompt_encoder.has_chat_template:
        click.echo(PLAIN_TEXT, err=True)
    exact = is_exact(engine.decoder.backend.precision)
    if model is not None and not exact:
        raise click.UsageError(
            f"--model is compared with fp32, not with {engine.decoder.backend.precision}; leave out one of the two"
        )
    trees, context = choose_trees(engine.bundle, profiles), engine.decoder.cache.context
    reference = None if model is None else Reference(model, engine.bundle.model)
    texts: list[Text] = []
    tokens = 0
    found: list[dict[str, Any]] = []
    failures = 0
    asked = converse(
        {engine.decoder.backend.name: TimedDecoder(engine.decoder, trees, warm=False)},
        engine.prompt_encoder,
        context,
        prompts,
        max_new_tokens=max_new_tokens,
        first_only=turns == "first",
    )
    for answers in asked:
        if isinstance(answers, Skipped):
            where = f"prompt {answers.prompt}/{len(prompts)}, turn {answers.turn}"
            click.echo(f"{where}: {answers.describe()}", err=True)
            continue
        (turn,) = answers.values()
        question, plain = turn.question, turn.plain.tokens
        where = f"prompt {question.prompt}/{len(prompts)}, turn {question.turn}"
        texts.append(Text(question.ids, plain))
        tokens += len(plain)
        click.echo(f"{where}: {len(question.ids)} tokens of prompt, {len(plain)} answered", err=True)
        for subject, difference in _differences(engine, turn, reference, max_new_tokens):
            failures += difference.fails
            found.append({"prompt": question.prompt, "turn": question.turn, "subject": subject, **asdict(difference)})
            where = f"prompt {question.prompt}, turn {question.turn}"
            click.echo(f"{where}, {subject}: {difference.describe(engine.tokenizer)}")
    if not texts:
        raise MedusaError(f"none of the {len(prompts)} prompts fits the context of {context} tokens")
    qualities = _qualities(engine.bundle, backend, gpu, texts)
    if output is not None:
        content = {
            "bundle": {"name": engine.bundle.root.name, "digest": engine.bundle.manifest.digest},
            "model": model,
            "versions": versions(),
            "profiles": [tree.name for tree in trees],
            "backend": backend,
            "precision": engine.decoder.backend.precision,
            **tolerances(exact),
            "answers": len(texts),
            "tokens": tokens,
            "passed": not failures,
            "differences": found,
            "quality": {name: asdict(quality) for name, quality in qualities.items()},
        }
        write_json(output, VERIFY.marked(content))
    against = "plain decoding" if model is None else f"plain decoding, and that against {model} in transformers"
    if qualities:
        click.echo(as_table(qualities))
    summary = f"{len(texts)} answers of {tokens} tokens in all, {len(trees)} profiles against {against}"
    if failures:
        raise MedusaError(f"{summary}: {failures} of {len(found)} differences are more than a tie")
    click.echo(f"{summary}: {f'{len(found)} ties, all else the same' if found else 'the same tokens'}")


def _qualities(bundle: Bundle, backend: str, gpu: int, texts: list[Text]) -> dict[str, Quality]:
    """Each quantised precision of a backend's graphs beside fp32, on `texts`; none where there are not both."""
    graphs = [facts.precision for facts in bundle.manifest.graphs.values() if facts.backend == backend]
    others = [precision for precision in FORMATS if precision in graphs and not is_exact(precision)]
    if not others or len(others) == len(graphs):
        return {}
    found, reference = {}, load_backend(bundle, backend, gpu=gpu)
    for precision in others:
        click.echo(f"quality of {precision} beside fp32, on {len(texts)} answers", err=True)
        found[precision] = measure(reference, load_backend(bundle, backend, precision, gpu=gpu), texts)
    return found


def _differences(
    engine: Engine, turn: Measurement, reference: Reference | None, max_new_tokens: int
) -> Iterator[tuple[str, Difference]]:
    """Give each difference of one turn with what was compared."""
    for name, difference in turn.differences.items():
        yield f"{name} against plain decoding", difference
    if reference is None:
        return
    expected = reference.answer(turn.question.ids, max_new_tokens)
    readers = next_logits(engine.decoder), reference.next_logits
    parted = compare(turn.question.ids, expected, turn.plain.tokens, *readers)
    if parted is not None:
        yield "plain decoding against transformers", parted
