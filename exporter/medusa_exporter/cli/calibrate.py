"""`medusa-export calibrate`: measure step times and head accuracy on this machine."""

from __future__ import annotations

from pathlib import Path

import click
from medusa_runtime.backends import BACKENDS
from medusa_runtime.bundle import Bundle
from medusa_runtime.calibration import GraphCalibration, to_document
from medusa_runtime.errors import BundleError
from medusa_runtime.facts import GraphFacts
from medusa_runtime.profile_choice import QUANTISED, expect_all, fastest

from medusa_exporter.calibration.calibrate import Plan, calibrate
from medusa_exporter.calibration.table import expectations_table, step_times_table
from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import (
    INPUT_FILE,
    backends_option,
    digest_option,
    gpu_option,
    length_option,
    limit_option,
    list_option,
    threads_option,
    turns_option,
)
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import Progress, note
from medusa_exporter.output_kinds import CALIBRATION
from medusa_exporter.prompts import load_prompts
from medusa_exporter.wording import counted

MOST_SPREAD = 0.25  # of the median, between the quartiles of a plain step's time on a quiet machine
FEWEST_ANSWERS = 20


@click.command(
    name="calibrate", cls=Command, example="medusa-export calibrate bundle --precision int8 --prompts prompts.jsonl"
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    "file",
    type=INPUT_FILE,
    metavar="FILE",
    help='JSON Lines file of prompts to measure the heads with: each line has "turns", a list of user messages. '
    "Default: only step times are measured, and the accuracy of the heads that was measured before is kept.",
)
@backends_option(f"Backends to calibrate: {', '.join(BACKENDS)}.")
@list_option(
    "--precision",
    "precisions",
    metavar="NAME",
    help="Precisions to calibrate, e.g. int8. Default: all that the bundle has for the backends.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    default=120,
    show_default=True,
    help="How long to time steps, all graphs together; each size is timed in at least three rounds. Answering prompts "
    "takes more time.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=2),
    metavar="TOKENS",
    default=128,
    show_default=True,
    help="Maximum number of tokens of an answer to a prompt.",
)
@turns_option
@limit_option
@threads_option
@length_option
@gpu_option
@digest_option
@json_option("the calibrations, a file that --calibration accepts,")
def command(
    bundle: Path,
    file: Path | None,
    backends: tuple[str, ...],
    precisions: tuple[str, ...],
    seconds: float,
    max_new_tokens: int,
    turns: str,
    limit: int | None,
    threads: int | None,
    max_length: int | None,
    gpu: int,
    expected_digest: str | None,
    results: Results,
) -> None:
    """Measure how long the steps of BUNDLE take on this machine, and how well its heads predict.

    Steps of all sizes are timed in turns, behind pasts of several lengths. With --prompts, the model also answers
    prompts, and the ranks are recorded at which the heads had the tokens that it chose; no text is stored. The result
    is kept in the user's cache, for this bundle, machine and software. From then on `Engine.load` and `generate` choose
    drafts by it, the bundle's fastest trees among them, and `medusa-export search-tree` finds better trees. Of a bundle
    without heads step times are measured, of tokens that are copied from the text.
    """
    results.check(CALIBRATION, inputs=[file] if file else [], bundle=bundle)
    opened = Bundle.open(bundle, expected_digest=expected_digest)
    graphs = choose_graphs(opened, backends, precisions)
    if len(graphs) > 1:  # damage to the last one is found before the first one is measured
        opened.verify(name for name in opened.manifest.files if name.startswith("graphs/"))
    if file and not opened.heads.count:
        raise BundleError(
            f"{bundle} has no heads whose accuracy prompts could measure; leave out --prompts, or build the bundle "
            "with --heads"
        )
    prompts = load_prompts(file, limit) if file else []
    plan = Plan(seconds, prompts, max_new_tokens, turns == "first", threads, max_length, gpu)
    done: list[GraphCalibration] = []
    for calibration, kept in calibrate(opened, graphs, plan, Progress()):
        done.append(calibration)
        results.save(CALIBRATION, to_document(done))
        results.echo(_summary(opened, calibration))
        if kept is not None:
            note(f"kept in {kept}")
    results.write(CALIBRATION, to_document(done))


def choose_graphs(bundle: Bundle, backends: tuple[str, ...], precisions: tuple[str, ...]) -> list[GraphFacts]:
    """Return the graphs of a bundle for these backends and precisions, all precisions if there are none.

    Raises BundleError if a backend or a pair has no graph.
    """
    graphs = []
    for backend in backends:
        has = [graph.precision for graph in bundle.manifest.graphs.values() if graph.backend == backend]
        wanted = precisions or tuple(has) or (None,)  # None is refused with the list of graphs
        graphs += [bundle.graph(backend, precision)[0] for precision in wanted]
    return graphs


def _summary(bundle: Bundle, calibration: GraphCalibration) -> str:
    """Format the step times and what to expect of the bundle's trees."""
    lines = [step_times_table(calibration)]
    if lines_of_doubt := doubts(calibration):
        lines += ["", *lines_of_doubt, ""]
    if not bundle.heads.count:
        remark = "this bundle has no heads: steps of several nodes verify tokens that were copied from the text\n"
        return "\n".join([*lines, remark])
    trees, acceptance = bundle.profiles().values(), calibration.acceptance
    best = fastest(calibration, trees)
    if best is None or acceptance is None:
        return "\n".join([*lines, "the heads were not measured: --prompts FILE finds out which tree is the fastest\n"])
    samples, answers = len(acceptance.samples()[0]), counted(len(acceptance.answers), "answer")
    lines += [
        f"\nexpected of the bundle's trees, from {samples:,} tokens of {answers}, behind a past of "
        f"{acceptance.past:.0f} tokens",
        expectations_table(expect_all(calibration, trees)),
        f"fastest: {best.profile.name}; Engine.load and generate use it on this machine",
    ]
    if calibration.precision in QUANTISED:
        lines.append(f"in {calibration.precision} only chains are chosen, whose tokens are exactly plain decoding's")
    return "\n".join(lines) + "\n"


def doubts(calibration: GraphCalibration) -> list[str]:
    """Return a sentence for each reason why a calibration may not hold."""
    found = []
    plain = [step for step in calibration.steps if step.nodes == 1]
    if any(step.spread_ms > MOST_SPREAD * step.ms for step in plain):
        found.append(
            f"warning: the times of plain steps spread by more than {MOST_SPREAD:.0%} of their median: other processes "
            "were at work; calibrate again when the machine is quiet"
        )
    acceptance = calibration.acceptance
    if acceptance is not None and len(acceptance.answers) < FEWEST_ANSWERS:
        answers = counted(len(acceptance.answers), "answer")
        found.append(f"warning: only {answers} to choose a tree by, expected {FEWEST_ANSWERS} or more")
    return found
