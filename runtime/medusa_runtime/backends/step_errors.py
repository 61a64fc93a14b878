"""Errors that all backends raise in the same words: a library failed in a step, or the wrong thread reads results."""

from __future__ import annotations

import threading

from medusa_runtime.backends.base import Step
from medusa_runtime.errors import BackendError, BusyError, CapacityError, MedusaError

# How libraries report a failed allocation: ONNX Runtime's arenas, CUDA, C++.
OUT_OF_MEMORY = ("allocate memory", "out of memory", "bad_alloc", "bad allocation", "cudaErrorMemoryAllocation")
COMMITTED_BEFORE = "an earlier commit of this step was finished or interrupted; run the step again"
MAX_MESSAGE = 600  # characters of the library's own message


def step_error(name: str, precision: str, step: Step, error: object) -> MedusaError:
    """Return the error for a step that a library could not run.

    Args:
        name: Name of the backend.
        precision: Precision of its graph.
        step: The step that failed.
        error: What the library raised.

    Returns:
        A CapacityError where memory was missing, otherwise a BackendError; the library's own message is part of it.
    """
    message = " ".join(str(error).split())[:MAX_MESSAGE]
    nodes, length = step.input_ids.shape[1], int(step.past_length.max())
    what = f"{name} failed in a step of {nodes} tokens behind {length} in {precision}: {message}"
    if isinstance(error, MemoryError) or any(one in message for one in OUT_OF_MEMORY):
        return CapacityError(
            f"{what}; expected enough memory for the step: close what else uses the memory, or choose a smaller "
            "max_length"
        )
    return BackendError(
        f"{what}; expected the step to run. Nothing of it is kept: try again, and if it fails again rebuild the bundle "
        "or choose another backend"
    )


def check_reading_thread(name: str, ran_in: int) -> None:
    """Raise BusyError unless the calling thread ran the last step.

    Args:
        name: Name of the backend.
        ran_in: Identifier of the thread that ran the last step.
    """
    if ran_in != threading.get_ident():
        raise BusyError(
            f"the last step of {name} was run by another thread, expected results to be read and committed by the "
            "thread that ran it; run the step in this thread, or use one thread only"
        )
