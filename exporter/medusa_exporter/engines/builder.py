"""Builds one TensorRT engine from one graph, with progress, a timing cache, and TensorRT's own error messages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_runtime import contract
from medusa_runtime.backends.tensorrt import round_past_down
from medusa_runtime.errors import BundleError

from medusa_exporter.engines.flavours import Flavour
from medusa_exporter.engines.step_sizes import Capacity, StepSize

Report = Callable[[str], None]
WORKSPACE = 4 << 30  # bytes that the builder may use for a tactic's scratch memory
PROGRESS_INTERVAL = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine, the size of its steps, and the timing cache of its build; None if nothing was timed."""

    engine: bytes
    size: StepSize
    timing_cache: bytes | None


def build_engine(
    flavour: Flavour,
    graph: Path,
    precision: str,
    capacity: Capacity,
    targets: Sequence[str] = (),
    *,
    timing_cache: bytes = b"",
    report: Report = lambda _line: None,
) -> BuiltEngine:
    """Parse an ONNX file and build its engine, without writing a file.

    Args:
        flavour: The installed TensorRT flavour.
        graph: The ONNX file; its only dynamic dimension is P, the rows of the past.
        precision: Precision of the graph.
        capacity: Range of P.
        targets: Compute capabilities, such as "sm86", if the flavour builds ahead of time.
        timing_cache: Timing cache of earlier builds.
        report: Called with a line of progress every few seconds.

    Raises:
        BundleError: With the messages of the parser or the builder.
    """
    trt = flavour.trt
    log = _log(trt)
    builder = trt.Builder(log)
    network = flavour.network(builder)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BundleError(_failure(flavour, "cannot read", graph, errors or log.errors))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    flavour.configure(config, network, precision, targets)
    config.add_optimization_profile(_profile(flavour, builder, network, capacity))
    cache = None if flavour.ahead_of_time else _timing_cache(config, timing_cache)  # ahead of time nothing is timed
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, report)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BundleError(_failure(flavour, "cannot build an engine for", graph, log.errors))
    measured = None if cache is None else bytes(config.get_timing_cache().serialize())
    return BuiltEngine(bytes(engine), _sizes(network), measured)


def _parser_error(error: Any) -> str:
    """Return the message of a parser error, with the node if the parser names one."""
    node = f"{error.node_operator()} {error.node_name()}: " if hasattr(error, "node_operator") else ""
    return f"{node}{error.desc()}"


def _failure(flavour: Flavour, what: str, graph: Path, errors: Sequence[str]) -> str:
    return f"{flavour.name} {flavour.version} {what} {graph}: {'; '.join(errors[-3:]) or 'it gives no reason'}"


def _sizes(network: Any) -> StepSize:
    shapes = {one.name: tuple(one.shape) for one in (network.get_input(index) for index in range(network.num_inputs))}
    (batch, nodes), rows = shapes[contract.INPUT_IDS], shapes[contract.LOGIT_ROWS][1]
    return StepSize(batch, nodes, rows, contract.DRAFT_HIDDEN in shapes)


def _profile(flavour: Flavour, builder: Any, network: Any, capacity: Capacity) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape:  # P is the only dynamic dimension
            row, most = -math.prod(shape), flavour.max_elements
            if most is not None and row * capacity.most > most:
                raise BundleError(
                    f"{flavour.name} {flavour.version} supports no tensor of more than {most} elements, and keys and "
                    f"values of {capacity.most} tokens are {row * capacity.most}; build with --max-length "
                    f"{round_past_down(most // row)} or less"
                )
            sizes = (capacity.least, capacity.best, capacity.most)
            profile.set_shape(tensor.name, *(tuple(rows if size == -1 else size for size in shape) for rows in sizes))
    return profile


def _timing_cache(config: Any, measured: bytes) -> Any:
    """Let the build use the timing cache of earlier ones."""
    cache = config.create_timing_cache(measured)
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _log(trt: Any) -> Any:
    """Return a logger that collects errors and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

    return Log()


def _monitor(trt: Any, report: Report) -> Any:
    """Return a monitor that reports the progress of each long phase, every few seconds."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.reported = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self.reported > PROGRESS_INTERVAL:
                self.reported = time.monotonic()
                report(f"  {phase_name}: {step + 1} of {self.steps.get(phase_name, 0)}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
