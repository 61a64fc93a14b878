"""Runs bound steps one after another, and waits first for a step that was interrupted."""

from __future__ import annotations

import time

from medusa_runtime.backends.base import Step
from medusa_runtime.backends.completed_run import CompletedRun
from medusa_runtime.backends.device import Device
from medusa_runtime.backends.host_rows import HostRows
from medusa_runtime.backends.step_binding import StepBinding
from medusa_runtime.backends.step_errors import step_error
from medusa_runtime.errors import MedusaError


class StepExecutor:
    """The only way to run a step, and the only place where a `CompletedRun` is made.

    If a run raises, by an error or a KeyboardInterrupt, the device may still be reading the step's inputs in pinned
    host memory. The next run therefore waits for the device before it overwrites them.
    """

    def __init__(self, name: str, precision: str, device: Device) -> None:
        """Start with no step run. name, precision: those of the backend, for error messages."""
        self._name, self._precision, self._device = name, precision, device
        self._unfinished = False  # whether a run began and did not return
        self._rows = HostRows(device)

    def run(self, binding: StepBinding, step: Step) -> CompletedRun:
        """Write a step's inputs, run it and wait until it is done.

        Raises BackendError, or CapacityError for want of memory, where the library fails.
        """
        if self._unfinished:
            self._device.synchronize()
        binding.host.write(step)
        self._unfinished = True
        started = time.perf_counter()
        try:
            binding.runner.run()
        except MedusaError:
            raise
        except Exception as error:  # libraries raise many kinds
            raise step_error(self._name, self._precision, step, error) from error
        seconds = time.perf_counter() - started
        self._unfinished = False
        self._rows.begin()
        return CompletedRun(binding, seconds, self._rows)
