"""`medusa-export bench`: time tree decoding against plain decoding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends import BACKENDS
from medusa_runtime.engine import Engine
from medusa_runtime.errors import MedusaError
from medusa_runtime.facts import PLAIN

from medusa_exporter import bench
from medusa_exporter.bench import Skipped, Turn
from medusa_exporter.cli.options import precision_option, split_commas
from medusa_exporter.files import write_json
from medusa_exporter.prompts import Turns, read_categories
from medusa_exporter.verify import QUANTISED_TOLERANCE, TOLERANCE, is_exact, tolerances

COLUMNS = {  # heading -> key of a result
    "nodes": "nodes",
    "tok/step": "tokens_per_step",
    "plain ms": "plain_step_ms",
    "medusa ms": "medusa_step_ms",
    "overhead": "overhead",
    "speed-up": "speedup",
    "host us": "host_us_per_step",
    "diverged": "divergences",
}


@click.command(name="bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", "file", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--profile", "profiles", multiple=True, callback=split_commas, help="Trees to time. Default: all of the bundle."
)
@click.option("--backend", default="ort-cpu", show_default=True, type=click.Choice(list(BACKENDS)))
@precision_option
@click.option(
    "--threads", type=click.IntRange(min=1), help="Default: one per physical core, within a container's quota."
)
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=2), help="Per answer.")
@click.option("--turns", default="all", show_default=True, type=click.Choice(["all", "first"]))
@click.option("--limit", type=click.IntRange(min=1), help="At most so many prompts of the file.")
@click.option("--json", "output", required=True, type=click.Path(path_type=Path), help="Where the figures go.")
def command(
    bundle: Path,
    file: Path,
    profiles: tuple[str, ...],
    backend: str,
    precision: str | None,
    threads: int | None,
    max_new_tokens: int,
    turns: str,
    limit: int | None,
    output: Path,
) -> None:
    """Time BUNDLE's trees against its own plain decoding (one token a step, no heads run), prompt by prompt.

    The prompt file holds JSON lines with "turns", a list of user messages; a later message is asked after the model's
    own answers. Every tree answers every message, interleaved and warmed up; prefill is not timed. Exit code 1 when
    tokens differ from plain decoding's by more than a tie (1e-3 logits in fp32, where weights are quantised 1% of the
    row's range); the JSON is written all the same. Lines that have a "category" are counted by it too.
    """
    bench.check_output(output, bundle)
    prompts = bench.load_prompts(file, limit)
    engine = Engine.load(bundle, backend=backend, profile=PLAIN, precision=precision, threads=threads)
    trees = bench.choose_trees(engine.bundle, profiles)
    done, skipped = _run(engine, prompts, trees, max_new_tokens, turns == "first")
    if not any(turn.plain.steps for turn in done):
        raise MedusaError(f"no step was taken on the {len(prompts)} prompts of {file}: nothing to time")
    running = engine.decoder.backend
    categories = read_categories(file)
    results = [
        bench.aggregate(done, tree, running.name, running.precision)
        | {"categories": bench.by_category(done, tree, categories)}
        for tree in trees
    ]
    facts = engine.bundle.manifest
    write_json(
        output,
        {
            "machine": bench.machine(threads),
            "versions": bench.versions(),
            "bundle": {"name": engine.bundle.root.name, "model": facts.model.name, "digest": facts.digest},
            "prompts": {
                "file": file.name,
                "count": len(prompts),
                "turns": len(done),
                "skipped": [{"prompt": one.prompt, "turn": one.turn, "tokens": one.tokens} for one in skipped],
            },
            "settings": {
                "backend": running.name,
                "precision": running.precision,
                "profiles": [tree.name for tree in trees],
                "accept": "greedy",
                "max_new_tokens": max_new_tokens,
                "turns": turns,
                "limit": limit,
                **tolerances(is_exact(running.precision)),
            },
            "results": results,
        },
    )
    click.echo(_table(results))
    if len(results[0]["categories"]) > 1:
        click.echo(_categories(results))
    failures = 0
    for turn in done:
        for name, difference in turn.differences.items():
            failures += difference.fails
            click.echo(f"prompt {turn.prompt}, turn {turn.turn}, {name}: {difference.describe(engine.tokenizer)}")
    if failures:
        tie = f"{TOLERANCE:g} logits" if is_exact(running.precision) else f"{QUANTISED_TOLERANCE:.0%} of a row's range"
        raise MedusaError(
            f"{failures} answers differ from plain decoding's by more than a tie ({tie}): the "
            f"figures in {output} are not of the same text; look into it with medusa-export verify"
        )


def _run(
    engine: Engine, prompts: Sequence[Turns], trees: Sequence[TreeProfile], limit: int, first_only: bool
) -> tuple[list[Turn], list[Skipped]]:
    """Take every turn, and tell how far it is."""
    done: list[Turn] = []
    skipped: list[Skipped] = []
    started = time.monotonic()
    tokens, steps = dict.fromkeys((tree.name for tree in trees), 0), dict.fromkeys((tree.name for tree in trees), 0)
    for turn in bench.walk(engine, prompts, trees, max_new_tokens=limit, first_only=first_only, warm=True):
        where = f"[{time.monotonic() - started:6.1f} s] prompt {turn.prompt}/{len(prompts)}, turn {turn.turn}"
        if isinstance(turn, Skipped):
            skipped.append(turn)
            click.echo(f"{where}: {turn.describe()}", err=True)
            continue
        done.append(turn)
        for name, run in turn.trees.items():
            tokens[name] += len(run.tokens) - 1
            steps[name] += run.steps
        so_far = ", ".join(f"{name} {tokens[name] / steps[name]:.2f}" for name in tokens if steps[name])
        click.echo(f"{where}: {len(turn.plain.tokens)} tokens; tokens/step so far: {so_far or 'none'}", err=True)
    return done, skipped


def _table(results: Sequence[dict[str, Any]]) -> str:
    width = max(len("profile"), *(len(result["profile"]) for result in results))
    lines = [f"{'profile':<{width}}" + "".join(f"{heading:>11}" for heading in COLUMNS)]
    for result in results:
        cells = (_cell(result[key]) for key in COLUMNS.values())
        lines.append(f"{result['profile']:<{width}}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def _categories(results: Sequence[dict[str, Any]]) -> str:
    """Tokens per step of every tree in every category."""
    names = list(results[0]["categories"])
    width = max(len("tokens/step"), *map(len, names))
    columns = [max(11, len(result["profile"]) + 2) for result in results]
    heading = zip(results, columns, strict=True)
    lines = [f"{'tokens/step':<{width}}  prompts" + "".join(f"{one['profile']:>{size}}" for one, size in heading)]
    for name in names:
        found = [result["categories"][name] for result in results]
        cells = zip(found, columns, strict=True)
        line = "".join(f"{_cell(one['tokens_per_step']):>{size}}" for one, size in cells)
        lines.append(f"{name:<{width}}{found[0]['prompts']:>9}{line}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.0f}" if value >= 100 else f"{value:.2f}"
