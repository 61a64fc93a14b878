"""The only import of llguidance, so that it is only needed, and only loaded, where an answer has to match something."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from medusa_runtime.errors import ArgumentError, CapacityError, MedusaError, MissingExtraError
from medusa_runtime.package_versions import check_version

MIN_VERSION = (1, 9)
STACK_BYTES = 256 << 20  # of the thread that compiles; reserved, not used, unless a grammar is deep
MAX_MESSAGE = 300  # characters of an error message of llguidance that are repeated
_STACK_SIZE = threading.Lock()  # the size of the stacks of new threads is one of the process
Returned = TypeVar("Returned")


def import_llguidance() -> Any:
    """Return the module `llguidance`.

    Raises:
        MissingExtraError: It is not installed or too old; the message has the pip command.
    """
    command = "pip install --upgrade 'medusa-export[structured]'"
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtraError(
            f"structured outputs need llguidance, which is not installed ({error}); install it: {command}"
        ) from error
    check_version("llguidance", llguidance.__version__, MIN_VERSION, command)
    return llguidance


def call_with_large_stack(function: Callable[[], Returned]) -> Returned:
    """Call a function in a thread with a stack of 256 MiB and return its result, or raise its error.

    llguidance recurses along chains of definitions, and a stack that overflows ends the process.

    Raises:
        CapacityError: Memory does not suffice for the stack.
    """
    results: list[Returned] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=call, name="medusa-grammar", daemon=True)
    with _STACK_SIZE:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        except RuntimeError as error:
            raise CapacityError(
                f"a thread with a stack of {STACK_BYTES >> 20} MiB, which compiles grammars, cannot be started "
                f"({error}); allow the process more memory or threads"
            ) from None
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def refused(what: str, expected: str, kind: type[MedusaError] = ArgumentError) -> Iterator[None]:
    """Convert errors of llguidance to `kind`: Exception, and panics of its Rust code, which are BaseException.

    Args:
        what: What was wrong, in words.
        expected: What was expected.
        kind: The error to raise.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, MedusaError):
            raise
        if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
            raise kind(f"{what}: {shortened(str(error))}; expected {expected}") from None
        raise


def shortened(message: str) -> str:
    """Return the beginning of a message of llguidance in one line, without the state of its parser behind it."""
    text = " ".join(message.partition("<state>")[0].split())
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…"
