"""A step binding: everything that steps of one shape run with, prepared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from medusa_runtime.backends.batch_memory import BatchMemory
from medusa_runtime.backends.host_buffers import HostBuffers
from medusa_runtime.backends.step_shape import StepShape


class StepRunner(Protocol):
    """Runs steps of one shape with a library, over inputs and outputs whose addresses were bound before."""

    def run(self) -> None:
        """Run one step and wait until it is done. Raises what the library raises."""


@dataclass(frozen=True, eq=False, slots=True)
class StepBinding:
    """One shape, its host buffers, the device memory it reads and writes, and the runner bound to all of these.

    A binding keeps its memory alive: when larger outputs are allocated for another shape, this binding still writes to
    the outputs that it was bound to.
    """

    runner: StepRunner
    shape: StepShape
    host: HostBuffers
    memory: BatchMemory
