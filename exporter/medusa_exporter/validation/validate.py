"""Compares every graph of a build with the model, one at a time; a graph that differs ends the build."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from medusa_runtime.facts import GraphFacts, HeadFacts, ModelFacts
from medusa_runtime.graph_check import DIFFERENCES, GraphCheck

from medusa_exporter.engines.step_sizes import StepSize
from medusa_exporter.graph.check import SavedGraph, check_saved_graph
from medusa_exporter.validation.errors import GraphMismatchError
from medusa_exporter.validation.graph_runner import GraphRunner, MissingKernelError
from medusa_exporter.validation.limits import Limits, TensorDifference, draft_error, limits, tensor_differences
from medusa_exporter.validation.steps import RecordedStep, Recording

CANDIDATES = 15  # of the heads' candidates that are compared, at most
SIZE_LEFT_OUT = "its steps have neither the fewest nor the most nodes of those built, whose graphs were run"
CPU_BACKEND = "ort-cpu"  # the backend that runs its graphs in the same library as the validation
BF16 = "ONNX Runtime's CPU provider does not support bfloat16"
REMEDY = (
    "expected the model's own values, so no bundle was written: build with the versions of constraints.txt, and "
    "report this together with the model's name if it stays"
)


@dataclass(frozen=True)
class GroundTruth:
    """What graphs are compared with: the recorded reference, and facts about the model and its heads."""

    reference: Recording
    model: ModelFacts
    heads: HeadFacts


def validate_graphs(
    folder: Path,
    files: Iterable[str],
    graphs: Sequence[GraphFacts],
    sizes: Mapping[str, StepSize],
    truth: GroundTruth,
    report: Callable[[str], None] = lambda _line: None,
) -> dict[str, GraphCheck]:
    """Compare graphs with the model.

    Args:
        folder: Folder of the bundle.
        files: Paths of the graph files in the bundle.
        graphs: The bundle's graphs; each file belongs to one of them.
        sizes: Step size of each file whose shapes are fixed. Of the files of one backend and precision, only the
            smallest, the largest and the largest with heads are run.
        truth: What the model itself computes.
        report: Called with a line for each graph.

    Returns:
        The differences that were measured, by file.

    Raises:
        GraphMismatchError: If a graph computes other values than the model.
        RuntimeError: If a graph's inputs or outputs are not those of the contract.
    """
    of_key = {graph.key: graph for graph in graphs}
    left_out = _left_out(sizes)
    checks = {}
    for file in files:
        key = next(key for key in of_key if file.startswith((f"graphs/{key}.", f"graphs/{key}-")))
        declared = check_saved_graph(folder / file, truth.model, truth.heads, sizes.get(file))
        runner = SIZE_LEFT_OUT if file in left_out else _runner(declared, of_key[key])
        if isinstance(runner, str):
            report(f"check {Path(file).stem}: ONNX checker, inputs and outputs; not run here: {runner}")
            checks[file] = GraphCheck(not_run=runner)
            continue
        report(f"check {Path(file).stem}: ONNX checker, inputs and outputs, values compared with the model's")
        checks[file] = check_graph(runner, limits(of_key[key].backend, of_key[key].precision), truth)
        del runner  # its session ends before the next one begins
    return checks


def _runner(graph: SavedGraph, facts: GraphFacts) -> GraphRunner | str:
    """Load a graph, or return why the CPU cannot run it; raise GraphMismatchError if the graph is for the CPU."""
    if graph.dtype == "bfloat16":
        return BF16
    try:
        return GraphRunner(graph, packed=packs_weights(facts.backend, facts.precision))
    except MissingKernelError as error:
        if facts.backend == CPU_BACKEND:
            raise GraphMismatchError(
                f"{graph.path.name}: ONNX Runtime's CPU provider cannot run it ({error}), expected a graph that it "
                "serves: build with the versions of constraints.txt, and report this if it stays"
            ) from error
        return f"ONNX Runtime's CPU provider cannot: {error}"


def packs_weights(backend: str, precision: str) -> bool:
    """Return whether a graph's weights are repacked as they are for serving: only those of quantised CPU graphs."""
    return backend == CPU_BACKEND and precision != "fp32"


def check_graph(runner: GraphRunner, limit: Limits, truth: GroundTruth) -> GraphCheck:
    """Run one graph and compare it with the model. Raises GraphMismatchError if it differs by more than `limit`."""
    graph = runner.graph
    worst = dict.fromkeys(DIFFERENCES, 0.0)
    names = []
    for step in truth.reference.steps:
        parts = runner.parts(step.first_layer() if step.far and not limit.by_row else step)
        for part in parts:
            for one in _all_differences(runner, part, limit, truth):
                if not one.passed:
                    raise GraphMismatchError(_mismatch_message(graph, step.name, one, truth.model.layers))
                if one.part in worst and not one.mean:
                    worst[one.part] = max(worst[one.part], one.error)
        names += [step.name] if parts else []
    if _check_draft(runner, limit, truth):
        names.append("draft")
    logits, keys, values = (_rounded(worst[part]) for part in DIFFERENCES)
    return GraphCheck(tuple(names), logits, keys, values, limit.error)


def _all_differences(
    runner: GraphRunner, step: RecordedStep, limit: Limits, truth: GroundTruth
) -> Iterator[TensorDifference]:
    """Run a step; yield how far each sequence of the graph's batch differs from the model."""
    for found in runner.step(step):
        yield from tensor_differences(step, found, limit, truth.model.hidden_size, truth.heads.taps)


def _check_draft(runner: GraphRunner, limit: Limits, truth: GroundTruth) -> bool:
    """Compare the heads' candidates; return whether the graph has heads that can run."""
    draft, heads = truth.reference.draft, truth.heads
    most = min(CANDIDATES, (runner.most_nodes or CANDIDATES + 1) - 1)
    if draft is None or not runner.drafts or most < 1:
        return False
    ranks, numbers = np.divmod(np.arange(min(most, heads.count * heads.top_k), dtype=np.int32), heads.count)
    drafted = runner.draft(draft, (-1 - (numbers * heads.top_k + ranks)).astype(np.int32))
    worst = max(draft_error(draft, numbers, ranks, tokens) for tokens in drafted)
    one = TensorDifference("candidates", None, worst, limit.draft)
    if not one.passed:
        raise GraphMismatchError(_mismatch_message(runner.graph, "draft", one, truth.model.layers))
    return True


def _mismatch_message(graph: SavedGraph, step: str, one: TensorDifference, layers: int) -> str:
    """Return the message that names the graph, the step, where it first differs and by how much."""
    where = {
        "hidden state": f"the hidden state after layer {layers - 1}, the last",
        "logits": "the logits, after all layers",
        "argmax": "the choice of the most likely token, after all layers",
        "summaries": "the summaries of rows and the graph's own logits",
        "tokens": "the tokens, which are the step's own",
        "candidates": "the candidates of the heads",
    }.get(one.part, f"the {one.part} of layer {one.layer}")
    if one.part in ("keys", "values") and one.layer:
        where += f" (its own projections, or the output of layer {one.layer - 1})"
    return (
        f"{graph.path.name} differs from the model: in its {step} step {where} differ by {one.error:.2g} "
        f"{'in root mean square' if one.mean else 'at most'}, expected {one.limit:.2g}; {REMEDY}"
    )


def _left_out(sizes: Mapping[str, StepSize]) -> set[str]:
    """Return the files with fixed shapes that are neither the smallest nor the largest of their kind."""
    kinds: dict[str, list[str]] = {}
    for file, size in sizes.items():
        kinds.setdefault(file.removesuffix(f"-{size.name}.onnx"), []).append(file)
    kept = set()
    for of_kind in kinds.values():
        ordered = sorted(of_kind, key=lambda file: sizes[file].nodes)
        kept |= {ordered[0], ordered[-1], *[file for file in ordered if sizes[file].draft][-1:]}
    return set(sizes) - kept


def _rounded(difference: float) -> float:
    """Round a difference to two significant digits."""
    return float(f"{difference:.1e}")
