"""`medusa-export compare`: compare the output tensors of two backends or precisions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends import BACKENDS, load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import CapacityError, MedusaError
from medusa_runtime.loading import LoadedBundle
from medusa_runtime.prompt_encoder import PromptEncoder

from medusa_exporter.bench.conversations import PLAIN_TEXT, encode_conversation
from medusa_exporter.bench.machine import versions
from medusa_exporter.built_in_prompts import BUILT_IN_PROMPTS
from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import (
    BACKEND_NAMES,
    INPUT_FILE,
    choose_trees,
    digest_option,
    gpu_option,
    limit_option,
    list_option,
    prompts_option,
)
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.compare import formatting, reference_file
from medusa_exporter.compare.arrays import load_polygraphy
from medusa_exporter.compare.reference_file import Side
from medusa_exporter.compare.row_summaries import SUMMARY_ERROR
from medusa_exporter.compare.steps import (
    BackendRunner,
    ComparisonPlan,
    Reference,
    ReferenceStep,
    rows_needed,
    run_steps,
)
from medusa_exporter.compare.summary import ComparisonSummary
from medusa_exporter.compare.tolerances import tolerance
from medusa_exporter.console import Progress
from medusa_exporter.extras import import_extra
from medusa_exporter.output_kinds import COMPARE, REFERENCE
from medusa_exporter.overwrite_check import check_output_file
from medusa_exporter.prompts import load_prompts
from medusa_exporter.wording import counted

STEPS = 8
Named = tuple[str, str | None]  # a backend and a precision; None for the default precision of the bundle


class _NamedType(click.ParamType):  # type: ignore[type-arg]  # click 8.2 has no type argument
    """Reads BACKEND or BACKEND:PRECISION."""

    name = "backend"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Named:
        backend, _, precision = value.partition(":")
        return click.Choice(list(BACKENDS)).convert(backend, param, ctx), precision or None


@click.command(name="compare", cls=Command, example="medusa-export compare bundle --backend ort-cpu:fp32,ort-cpu:int8")
@click.argument("bundle", type=click.Path(path_type=Path))
@digest_option
@list_option(
    *BACKEND_NAMES,
    "named",
    required=True,
    unique=False,
    kind=_NamedType(),
    metavar="NAME[:PRECISION]",
    help="The two backends to compare; the first one is the reference. The two may be the same backend in two "
    "precisions, e.g. ort-cpu:fp32,ort-cpu:int8. With --save or --against name one. Default precision: fp32, or the "
    f"only one in the bundle. Backends: {', '.join(BACKENDS)}.",
)
@prompts_option
@limit_option
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Number of decoding steps after each prompt; each is run both plain and as a tree. Default: {STEPS}.",
)
@click.option("--profile", metavar="NAME", help="Tree of the bundle to run. Default: the largest one.")
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Run one backend and write its outputs to FILE; compare nothing yet.",
)
@click.option(
    "--against",
    type=INPUT_FILE,
    metavar="FILE",
    help="Compare one backend with the outputs that --save wrote to FILE: with the same prompts, steps and tree.",
)
@gpu_option
@json_option("the outcome")
def command(
    bundle: Path,
    named: tuple[Named, ...],
    file: Path | None,
    limit: int | None,
    steps: int | None,
    profile: str | None,
    save: Path | None,
    against: Path | None,
    gpu: int,
    expected_digest: str | None,
    results: Results,
) -> None:
    """Compare all output tensors of two backends, or of two precisions of one backend, at every step.

    The first backend is the reference: it decodes the prompts greedily. The second one runs the same tokens and keeps
    the same paths. Every step is run twice, plain and as a tree; in a bundle without heads only plain. The error of a
    tensor is its largest difference as a share of the largest magnitude in it; the tolerance depends on the two
    precisions. Where the candidates of the heads differ, they are counted, and the tree is run again with those of the
    reference. The summaries of rows, which graphs for a GPU compute, are compared with the logits of the same side.

    To compare backends that cannot share a Python environment or a machine, run --save in one and --against in the
    other.

    Exit code 1 if an error is above its tolerance.
    """
    _check_usage(named, (file, limit, steps, profile), save, against, results)
    inputs = [source for source in (file, against) if source]
    results.check(COMPARE, inputs=inputs, bundle=bundle)
    if save is not None:
        check_output_file(save, REFERENCE, inputs=inputs, bundle=bundle)
    if save is None:
        load_polygraphy()  # before any work
    if against is not None:
        import_extra("safetensors", "export")
    opened = Bundle.open(bundle, expected_digest=expected_digest)
    progress = Progress()
    engines = [_load(opened, one, gpu, progress) for one in named]
    sides = [Side(loaded.decoder.backend.name, loaded.decoder.backend.precision) for loaded in engines]
    if against is not None:
        with reference_file.open_reference(against, opened) as recorded:
            plan, sides = recorded.plan, [recorded.side, *sides]
            outcome = _compare(opened, recorded, engines[0], plan, sides, progress)
            recorded.finish()
    else:
        plan = _plan(engines, file, limit, steps or STEPS, profile, progress)
        reference = BackendRunner(engines[0].decoder, plan)
        if save is not None:
            results.echo(_save(opened, reference, plan, sides[0], save, progress))
            return
        outcome = _compare(opened, reference, engines[1], plan, sides, progress)
    _conclude(opened, plan, sides, outcome, results)


def _check_usage(
    named: tuple[Named, ...], chosen: tuple[object, ...], save: Path | None, against: Path | None, results: Results
) -> None:
    """Raise UsageError for options that exclude each other. chosen: the options that --against takes from the file."""
    if save is not None and against is not None:
        raise click.UsageError("--save runs the reference, --against compares with one; leave out one of the two")
    if len(named) != (2 if save is None and against is None else 1):
        raise click.UsageError(f"--backend names {len(named)}; expected two, or one with --save or --against")
    if against is not None and any(value is not None for value in chosen):
        raise click.UsageError(
            "--against takes prompts, steps and tree from the file; leave out --prompts, --limit, --steps and --profile"
        )
    if save is not None and results.wants_json:
        raise click.UsageError("--save compares nothing yet; give --json with --against")


def _load(bundle: Bundle, named: Named, gpu: int, progress: Progress) -> LoadedBundle:
    backend, precision = named
    precision = bundle.graph(backend, precision)[0].precision
    progress.report(f"load {backend}:{precision}")
    decoder = Decoder(load_backend(bundle, backend, precision, gpu=gpu))
    return LoadedBundle(bundle, decoder, PromptEncoder(bundle))


def _plan(
    engines: list[LoadedBundle],
    file: Path | None,
    limit: int | None,
    steps: int,
    profile: str | None,
    progress: Progress,
) -> ComparisonPlan:
    """Encode the prompts, choose the tree, and cut prompts that leave no room in the context for the steps."""
    bundle = engines[0].bundle
    trees = choose_trees(bundle, [] if profile is None else [profile])
    largest = max(trees, key=lambda one: (one.size, one.name == f"tree-{one.size}"), default=None)  # fitted ones first
    tree = largest or TreeProfile.plain()  # without heads
    context = min(loaded.decoder.cache.context for loaded in engines)
    longest = context - rows_needed(tree, steps)
    if longest < 1:
        raise CapacityError(
            f"the context of {context} tokens has no room for a prompt and {counted(steps, 'step')} of {tree.name}; "
            "take fewer --steps or a smaller tree with --profile"
        )
    if not engines[0].prompt_encoder.has_chat_template:
        progress.report(PLAIN_TEXT)
    prompts = []
    conversations = list(BUILT_IN_PROMPTS)[:limit] if file is None else load_prompts(file, limit)
    for number, turns in enumerate(conversations, start=1):
        ids = encode_conversation(engines[0].prompt_encoder, [{"role": "user", "content": turns[0]}])
        if len(ids) > longest:
            progress.report(
                f"prompt {number}: the first {longest} of its {len(ids)} tokens, to leave room for the steps"
            )
        prompts.append(tuple(ids[:longest]))
    return ComparisonPlan(tuple(prompts), tree, steps, bundle.model.eos_token_ids)


def _reference_steps(
    bundle: Bundle, reference: Reference, plan: ComparisonPlan, progress: Progress
) -> Iterator[ReferenceStep]:
    """Run the steps of the plan with the reference, and report each prompt as it begins."""
    prompt = 0
    for taken in run_steps(reference, plan, bundle.heads.top_k):
        if taken.inputs.prompt != prompt:
            prompt = taken.inputs.prompt
            length = counted(len(plan.prompts[prompt - 1]), "token")
            progress.report(f"prompt {prompt}/{len(plan.prompts)}: {length}")
        yield taken


def _save(
    bundle: Bundle, reference: BackendRunner, plan: ComparisonPlan, side: Side, file: Path, progress: Progress
) -> str:
    """Run the reference, write its outputs, and return a summary."""
    with reference_file.write_reference(file, bundle, side, plan) as recorder:
        for taken in _reference_steps(bundle, reference, plan, progress):
            if (error := taken.summary_error) is not None and not error <= SUMMARY_ERROR:
                raise MedusaError(
                    f"{side}: the summaries of rows differ from their own logits by {error:.2g} in the "
                    f"{taken.inputs.kind} step {taken.inputs.step} of prompt {taken.inputs.prompt}, expected at most "
                    f"{SUMMARY_ERROR:.2g}; build the bundle again, and report this together with the versions"
                )
            recorder.add(taken.outputs)
    size = file.stat().st_size / 1e6
    steps, prompts = counted(recorder.steps, "step"), counted(len(plan.prompts), "prompt")
    return f"{side}: {steps} of {prompts}, {plan.tree.name}, {size:.0f} MB"


def _compare(
    bundle: Bundle,
    reference: Reference,
    other: LoadedBundle,
    plan: ComparisonPlan,
    sides: list[Side],
    progress: Progress,
) -> ComparisonSummary:
    limits = tolerance(*(side.precision for side in sides))
    runner = BackendRunner(other.decoder, plan)
    outcome = ComparisonSummary(bundle.model, bundle.heads, plan.tree, limits)
    for taken in _reference_steps(bundle, reference, plan, progress):
        outputs = runner.replay(taken)
        outcome.add(taken, outputs, runner.summary_error)
    return outcome


def _conclude(
    bundle: Bundle, plan: ComparisonPlan, sides: list[Side], outcome: ComparisonSummary, results: Results
) -> None:
    """Print and write the outcome. Raises MedusaError with the largest mismatch if there is one."""
    rows, worst = outcome.rows(), outcome.worst()
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
    results.write(COMPARE, content)
    results.echo(formatting.table(rows))
    reference, other = map(str, sides)
    if worst is not None:
        raise MedusaError(formatting.mismatch(worst, outcome.first, reference, other))
    steps, prompts = counted(outcome.steps, "step"), counted(len(plan.prompts), "prompt")
    kinds = "plain only: the bundle has no heads" if plan.tree.size == 1 else f"plain and {plan.tree.name}"
    results.echo(f"{other} equals {reference} within tolerance: {steps} of {prompts}, {kinds}")
