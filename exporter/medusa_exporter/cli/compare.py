"""`medusa-export compare`: two backends' outputs, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends import BACKENDS, load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.engine import Engine
from medusa_runtime.errors import CapacityError, MedusaError

from medusa_exporter.bench.conversations import PLAIN_TEXT, encode
from medusa_exporter.bench.machine import versions
from medusa_exporter.cli.options import Progress, choose_trees, digest_option, gpu_option, split_commas
from medusa_exporter.compare import formatting, reference_file
from medusa_exporter.compare.arrays import load_polygraphy
from medusa_exporter.compare.reference_file import Side
from medusa_exporter.compare.steps import Plan, Reference, ReferenceStep, StepRunner, rows_needed, run_steps
from medusa_exporter.compare.summary import ComparisonSummary
from medusa_exporter.compare.tolerances import tolerance
from medusa_exporter.extras import import_extra
from medusa_exporter.files import write_json
from medusa_exporter.output_kinds import COMPARE, REFERENCE
from medusa_exporter.overwrite_check import check_output_file
from medusa_exporter.prompts import load_prompts
from medusa_exporter.verify import PROMPTS

STEPS = 8
Named = tuple[str, str | None]  # a backend and its precision, None for the bundle's own choice


def _named(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[Named]:
    """Read BACKEND[:PRECISION], one or two of them."""
    found: list[Named] = []
    for word in split_commas(context, parameter, values):
        backend, _, precision = word.partition(":")
        if backend not in BACKENDS:
            raise click.BadParameter(f"{word!r} names no backend; expected one of {', '.join(BACKENDS)}")
        found.append((backend, precision or None))
    if not 1 <= len(found) <= 2:
        raise click.BadParameter(f"{len(found)} backends are named; expected two, or one with --save or --against")
    return found


@click.command(name="compare")
@click.argument("bundle", type=click.Path(path_type=Path))
@digest_option
@click.option(
    "--backends",
    "named",
    required=True,
    multiple=True,
    callback=_named,
    metavar="A[:PRECISION][,B[:PRECISION]]",
    help="The reference, and who is compared with it. Precision: fp32, or the only one, where none is named.",
)
@click.option(
    "--prompts",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines with 'turns', of which the first is taken. Default: a handful of built-in prompts.",
)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many prompts.")
@click.option("--steps", type=click.IntRange(min=1), help=f"Behind each prompt, plain and as a tree. Default: {STEPS}.")
@click.option("--profile", help="The tree to run. Default: the largest of the bundle.")
@click.option("--save", type=click.Path(path_type=Path), help="Run one backend and keep all that it gives there.")
@click.option(
    "--against",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare one backend with what --save kept: same prompts, steps and tree.",
)
@gpu_option
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the outcome there too.")
def command(
    bundle: Path,
    named: list[Named],
    file: Path | None,
    limit: int | None,
    steps: int | None,
    profile: str | None,
    save: Path | None,
    against: Path | None,
    gpu: int,
    output: Path | None,
    expected_digest: str | None,
) -> None:
    """Compare what two backends, or two precisions of one, give at every step on BUNDLE: all tensors, by polygraphy.

    The first decodes the prompts greedily; the second gets the same tokens and keeps the same paths. Every step is run
    plain and as a tree. Each tensor's largest error is a share of the largest magnitude in it; what is allowed depends
    on the two precisions. Candidates, which heads of fewer bits rank in another way, are counted alone, then the tree
    is run again with the first one's. Exit code 1 when anything is beyond its tolerance.

    --save and --against do the same in two processes, or on two machines.
    """
    alone = save is not None or against is not None
    if save is not None and against is not None:
        raise click.UsageError("--save runs the reference, --against compares with one; leave out one of the two")
    if len(named) != (1 if alone else 2):
        raise click.UsageError(f"--backends names {len(named)}; expected two, or one with --save or --against")
    if against is not None and (file, limit, steps, profile) != (None,) * 4:
        raise click.UsageError(
            "--against takes prompts, steps and tree from the file; leave out --prompts, --limit, --steps and --profile"
        )
    if save is not None and output is not None:
        raise click.UsageError("--save compares nothing yet; give --json with --against")
    for place, kind in ((save, REFERENCE), (output, COMPARE)):
        if place is not None:
            check_output_file(place, kind, inputs=[source for source in (file, against) if source], bundle=bundle)
    if save is None:
        load_polygraphy()  # before any work
    if against is not None:
        import_extra("safetensors", "export")
    opened = Bundle.open(bundle, expected_digest=expected_digest)
    progress = Progress()
    engines = [_load(opened, one, gpu, progress) for one in named]
    sides = [Side(engine.decoder.backend.name, engine.decoder.backend.precision) for engine in engines]
    if against is not None:
        with reference_file.open_reference(against, opened) as recorded:
            plan, sides = recorded.plan, [recorded.side, *sides]
            outcome = _compare(opened, recorded, engines[0], plan, sides, progress)
            recorded.finish()
    else:
        plan = _plan(engines, file, limit, steps or STEPS, profile, progress)
        reference = StepRunner(engines[0].decoder, plan)
        if save is not None:
            _save(opened, reference, plan, sides[0], save, progress)
            return
        outcome = _compare(opened, reference, engines[1], plan, sides, progress)
    _conclude(opened, plan, sides, outcome, output)


def _load(bundle: Bundle, named: Named, gpu: int, progress: Progress) -> Engine:
    backend, precision = named
    precision = bundle.graph(backend, precision)[0].precision
    progress.report(f"load {backend}:{precision}")
    return Engine(bundle, load_backend(bundle, backend, precision, gpu=gpu), TreeProfile.plain())


def _plan(
    engines: list[Engine], file: Path | None, limit: int | None, steps: int, profile: str | None, progress: Progress
) -> Plan:
    """Lay the prompts out; one that leaves no room for the steps behind it loses its end."""
    bundle = engines[0].bundle
    trees = choose_trees(bundle, [] if profile is None else [profile])
    tree = max(trees, key=lambda one: (one.size, one.name == f"tree-{one.size}"))  # fitted ones first
    context = min(engine.decoder.cache.context for engine in engines)
    longest = context - rows_needed(tree, steps)
    if longest < 1:
        raise CapacityError(
            f"the context of {context} tokens has no room for a prompt and {steps} steps of {tree.name}; take fewer "
            "--steps or a smaller tree with --profile"
        )
    if not engines[0].prompt_encoder.has_chat_template:
        progress.report(PLAIN_TEXT)
    prompts = []
    conversations = list(PROMPTS)[:limit] if file is None else load_prompts(file, limit)
    for number, turns in enumerate(conversations, start=1):
        ids = encode(engines[0].prompt_encoder, [{"role": "user", "content": turns[0]}])
        if len(ids) > longest:
            progress.report(
                f"prompt {number}: the first {longest} of its {len(ids)} tokens, to leave room for the steps"
            )
        prompts.append(tuple(ids[:longest]))
    return Plan(tuple(prompts), tree, steps, bundle.model.eos_token_ids)


def _watched(bundle: Bundle, reference: Reference, plan: Plan, progress: Progress) -> Iterator[ReferenceStep]:
    """Take the plan's steps, and tell with which prompt each begins."""
    prompt = 0
    for taken in run_steps(reference, plan, bundle.heads.top_k):
        if taken.inputs.prompt != prompt:
            prompt = taken.inputs.prompt
            progress.report(f"prompt {prompt}/{len(plan.prompts)}: {len(plan.prompts[prompt - 1])} tokens")
        yield taken


def _save(bundle: Bundle, reference: StepRunner, plan: Plan, side: Side, file: Path, progress: Progress) -> None:
    with reference_file.write_reference(file, bundle, side, plan) as recorder:
        for taken in _watched(bundle, reference, plan, progress):
            recorder.add(taken.outputs)
    size = file.stat().st_size / 1e6
    click.echo(f"{side}: {recorder.steps} steps of {len(plan.prompts)} prompts, {plan.tree.name}, {size:.0f} MB")


def _compare(
    bundle: Bundle, reference: Reference, other: Engine, plan: Plan, sides: list[Side], progress: Progress
) -> ComparisonSummary:
    limits = tolerance(*(side.precision for side in sides))
    runner = StepRunner(other.decoder, plan)
    outcome = ComparisonSummary(bundle.model, bundle.heads, plan.tree, limits)
    for taken in _watched(bundle, reference, plan, progress):
        outcome.add(taken, runner.replay(taken))
    return outcome


def _conclude(bundle: Bundle, plan: Plan, sides: list[Side], outcome: ComparisonSummary, output: Path | None) -> None:
    """Show and write the outcome. Raises MedusaError with the worst mismatch, if there is one."""
    rows, worst = outcome.rows(), outcome.worst()
    if output is not None:
        content: dict[str, Any] = {
            "bundle": {"name": bundle.root.name, "digest": bundle.manifest.digest},
            "versions": versions(),
            "reference": asdict(sides[0]),
            "compared": asdict(sides[1]),
            "profile": plan.tree.name,
            "prompts": len(plan.prompts),
            "steps": outcome.steps,
            "passed": worst is None,
            "tensors": formatting.as_json(rows),
        }
        write_json(output, COMPARE.marked(content))
    click.echo(formatting.table(rows))
    reference, other = map(str, sides)
    if worst is not None:
        raise MedusaError(formatting.mismatch(worst, outcome.first, reference, other))
    click.echo(
        f"{other} equals {reference} within tolerance: {outcome.steps} steps of {len(plan.prompts)} prompts, "
        f"plain and {plan.tree.name}"
    )
