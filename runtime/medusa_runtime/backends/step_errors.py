"""What backends say when a library fails in a step, or when a thread asks for what another one ran."""

from __future__ import annotations

import threading

from medusa_runtime.errors import BackendError, BusyError, CapacityError, MedusaError

# How libraries word a failed allocation: ONNX Runtime's arenas, CUDA, C++.
NO_MEMORY = ("allocate memory", "out of memory", "bad_alloc", "bad allocation", "cudaErrorMemoryAllocation")
LONGEST = 600  # characters of the library's own words


def step_error(name: str, precision: str, nodes: int, length: int, error: object) -> MedusaError:
    """Return the error for a step that a library could not run, with the library's own words.

    nodes: of the step. length: rows of the past. It is a CapacityError where memory was wanted, else a BackendError.
    """
    words = " ".join(str(error).split())[:LONGEST]
    step = f"{name} failed in a step of {nodes} tokens behind {length} in {precision}: {words}"
    if isinstance(error, MemoryError) or any(one in words for one in NO_MEMORY):
        return CapacityError(f"{step}; expected memory for it: close what else uses it, or give a smaller max_length")
    return BackendError(
        f"{step}; expected the step to run, nothing of it is kept: try again, and if it goes on failing build the "
        "bundle again or take another backend"
    )


def check_reading_thread(name: str, ran_in: int) -> None:
    """Raise BusyError unless this thread ran the last step. ran_in: the number of the thread that did."""
    if ran_in != threading.get_ident():
        raise BusyError(
            f"the last step of {name} was run by another thread, expected results to be read and kept by the thread "
            "that ran it; run the step here, or keep to one thread"
        )
