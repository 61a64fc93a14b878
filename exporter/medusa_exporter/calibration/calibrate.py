"""Calibrates the graphs of a bundle one after the other, and keeps the results in the user's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from medusa_runtime.backends import load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.calibration import Acceptance, GraphCalibration, to_document
from medusa_runtime.calibration_cache import calibration_file, find_graph, machine_of
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import CalibrationError
from medusa_runtime.facts import GraphFacts
from medusa_runtime.prompt_encoder import PromptEncoder

from medusa_exporter.bench.conversations import Skipped
from medusa_exporter.bench.fixed_length_prompts import prompts_of_length
from medusa_exporter.bench.timing import Measurement
from medusa_exporter.built_in_prompts import BUILT_IN_PROMPTS
from medusa_exporter.calibration.head_ranks import largest_worth_recording, measure_acceptance, recorded_ranks
from medusa_exporter.calibration.step_times import SIZES, choose_pasts, measure_step_times
from medusa_exporter.console import Progress
from medusa_exporter.files import write_json
from medusa_exporter.output_kinds import CALIBRATION
from medusa_exporter.prompts import Turns

Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        seconds: How long to time steps, all graphs together.
        prompts: The user messages of each conversation; none to leave out the acceptance.
        max_new_tokens: Maximum number of tokens of an answer.
        first_only: Whether only the first message of each conversation is asked.
        threads: CPU threads; None for the default.
        max_length: Maximum number of tokens of a sequence; None for the context of the bundle.
        gpu: Index of the GPU.
    """

    seconds: float
    prompts: Sequence[Turns] = ()
    max_new_tokens: int = 128
    first_only: bool = False
    threads: int | None = None
    max_length: int | None = None
    gpu: int = 0


def calibrate(
    bundle: Bundle, graphs: Sequence[GraphFacts], plan: Plan, progress: Progress
) -> Iterator[tuple[GraphCalibration, Path | None]]:
    """Calibrate graphs and yield each as soon as it is in the cache, with its file; None if it could not be kept.

    Without prompts the acceptance that the cache already has is kept.

    Raises:
        MedusaError: A backend cannot be loaded or fails.
    """
    end = monotonic() + plan.seconds
    for number, graph in enumerate(graphs):
        progress.report(f"{graph.key}: loading")
        seconds = (end - monotonic()) / (len(graphs) - number)
        begun = monotonic()
        found = calibrate_graph(bundle, graph, plan, seconds, progress)
        end += max(0.0, monotonic() - begun - seconds) if plan.prompts else 0.0  # answers are not part of the time
        yield found, keep(found, progress.report)


def calibrate_graph(
    bundle: Bundle, graph: GraphFacts, plan: Plan, seconds: float, progress: Progress
) -> GraphCalibration:
    """Time the steps of a graph for `seconds`, and measure the acceptance of its heads if the plan has prompts."""
    deadline = monotonic() + seconds
    backend = load_backend(bundle, graph.backend, graph.precision, plan.threads, plan.max_length, plan.gpu)
    machine = machine_of(backend)
    if bundle.heads.count:
        sizes = sorted({*SIZES, *(tree.size for tree in bundle.profiles().values())})
    else:
        sizes = [1, *(1 + count for count in backend.literal_counts)]
    encoder = PromptEncoder(bundle)
    (text, *_) = prompts_of_length(encoder, BUILT_IN_PROMPTS, choose_pasts(backend.model.context)[-1])
    remaining = max(0.0, deadline - monotonic())
    with progress.bar(f"{graph.key}: timing steps", remaining, "s") as bar:
        steps = measure_step_times(backend, sizes, text, remaining, bar.advance)
    measured = GraphCalibration(bundle.manifest.digest, graph.key, machine, steps)
    if not plan.prompts:
        return replace(measured, acceptance=_acceptance_before(measured))
    with progress.bar(f"{graph.key}: recording answers", len(plan.prompts), "prompts") as bar:
        last = 0

        def report(answer: Measurement | Skipped) -> None:
            nonlocal last
            number = answer.prompt if isinstance(answer, Skipped) else answer.question.prompt
            if isinstance(answer, Skipped):
                progress.report(f"prompt {answer.prompt}, turn {answer.turn}: {answer.describe()}")
            bar.advance(number - last)
            last = number

        acceptance = measure_acceptance(
            Decoder(backend),
            encoder,
            plan.prompts,
            recorded_ranks(bundle.heads, largest_worth_recording(measured, bundle.heads)),
            max_new_tokens=plan.max_new_tokens,
            first_only=plan.first_only,
            report=report,
        )
    return replace(measured, acceptance=acceptance)


def _acceptance_before(measured: GraphCalibration) -> Acceptance | None:
    """Return the acceptance that the cache has of the same graph, whatever versions it was measured with."""
    file = calibration_file(measured.bundle, measured.graph, measured.machine)
    try:
        return find_graph(file, measured.bundle, measured.graph).acceptance if file and file.exists() else None
    except (CalibrationError, OSError):
        return None


def keep(calibration: GraphCalibration, report: Report) -> Path | None:
    """Write a calibration into the user's cache; return the file, None if that is not possible."""
    file = calibration_file(calibration.bundle, calibration.graph, calibration.machine)
    try:
        if file is None:
            raise OSError("the user has no home folder")  # noqa: TRY301
        write_json(file, CALIBRATION.marked(to_document([calibration])))
    except OSError as error:
        report(f"the calibration cannot be kept ({error}); set MEDUSA_CACHE to a folder that can be written")
        return None
    return file
