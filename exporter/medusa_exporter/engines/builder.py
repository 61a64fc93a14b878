"""Builds one engine from one graph, with progress, a timing cache, and the parser's and builder's own words."""

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
QUIET = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Built:
    """An engine, the sizes of its steps, and what its build measured, for the next one; None where nothing was."""

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
) -> Built:
    """Parse the ONNX file `graph`, whose `past` is open in P, and build its engine. No file is written.

    targets: compute capabilities ("sm86") where the flavour builds ahead of time. timing_cache: what earlier builds
    measured. Raises BundleError with what the parser or the builder said.
    """
    trt = flavour.trt
    log = _log(trt)
    builder = trt.Builder(log)
    network = flavour.network(builder)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        said = [_told(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BundleError(_failure(flavour, "cannot read", graph, said or log.errors))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    flavour.configure(config, network, precision, targets)
    config.add_optimization_profile(_profile(flavour, builder, network, capacity))
    cache = None if flavour.ahead_of_time else _timing_cache(config, timing_cache)  # it measures nothing
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, report)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BundleError(_failure(flavour, "cannot build an engine for", graph, log.errors))
    measured = None if cache is None else bytes(config.get_timing_cache().serialize())
    return Built(bytes(engine), _sizes(network), measured)


def _told(error: Any) -> str:
    """What the parser says of an error: the node, where it names one."""
    node = f"{error.node_operator()} {error.node_name()}: " if hasattr(error, "node_operator") else ""
    return f"{node}{error.desc()}"


def _failure(flavour: Flavour, what: str, graph: Path, said: Sequence[str]) -> str:
    return f"{flavour.name} {flavour.version} {what} {graph}: {'; '.join(said[-3:]) or 'it did not say why'}"


def _sizes(network: Any) -> StepSize:
    given = {one.name: tuple(one.shape) for one in (network.get_input(index) for index in range(network.num_inputs))}
    (batch, nodes), rows = given[contract.INPUT_IDS], given[contract.LOGIT_ROWS][1]
    return StepSize(batch, nodes, rows, contract.DRAFT_HIDDEN in given)


def _profile(flavour: Flavour, builder: Any, network: Any, capacity: Capacity) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        given = network.get_input(index)
        shape = tuple(given.shape)
        if -1 in shape:  # P is all that is open
            row, most = -math.prod(shape), flavour.most_elements
            if most is not None and row * capacity.most > most:
                raise BundleError(
                    f"{flavour.name} {flavour.version} takes no tensor of more than {most} elements, and keys and "
                    f"values of {capacity.most} tokens are {row * capacity.most}; build with --max-length "
                    f"{round_past_down(most // row)} or less"
                )
            sizes = (capacity.least, capacity.best, capacity.most)
            profile.set_shape(given.name, *(tuple(rows if size == -1 else size for size in shape) for rows in sizes))
    return profile


def _timing_cache(config: Any, measured: bytes) -> Any:
    """Let the build start from what earlier ones have measured."""
    cache = config.create_timing_cache(measured)
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _log(trt: Any) -> Any:
    """A logger that keeps errors for the user and passes nothing on."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

    return Log()


def _monitor(trt: Any, report: Report) -> Any:
    """Tell how far the longest phase is, every few seconds."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.told = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self.told > QUIET:
                self.told = time.monotonic()
                report(f"  {phase_name}: {step + 1} of {self.steps.get(phase_name, 0)}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
