"""Reads model files with transformers: without questions to the user, and with errors that name the files."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from medusa_runtime.errors import MedusaError, UnsupportedModelError

from medusa_exporter.extras import import_extra
from medusa_exporter.loading.empty_stdin import empty_stdin

CODE_OPTION = "trust_remote_code"  # transformers' errors advise it; no code of a model is ever run here
MAX_REASON_LENGTH = 300  # characters of a library's message


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn every error of transformers in the block into an UnsupportedModelError.

    Standard input is empty meanwhile, so that no library can ask a question.

    Args:
        what: The files that are read, as the error names them.
    """
    transformers = import_extra("transformers", "export")
    transformers.utils.logging.disable_progress_bar()
    try:
        with empty_stdin():
            yield
    except (MedusaError, MemoryError):
        raise
    except Exception as error:  # libraries raise errors of all kinds for damaged files
        raise UnsupportedModelError(
            f"{what} cannot be read ({type(error).__name__}: {_reason(error)}); expected files that transformers "
            f"{transformers.__version__} reads without running their code: fetch the model again, or give another"
        ) from error


def _reason(error: Exception) -> str:
    """Return the message of an error on one line, without the advice to run a model's own code."""
    message = " ".join(str(error).split())
    if CODE_OPTION in message:
        return "the files need Python code of the model's authors, which is never run here"
    return message[:MAX_REASON_LENGTH]


@contextmanager
def parsed_once(gguf: str | None) -> Iterator[None]:
    """Parse a GGUF file once while the block runs; transformers parses it for config, weights and tokenizer each.

    Args:
        gguf: Name of the file; None for a model without one, where nothing is done.
    """
    if not gguf:
        yield
        return
    library = import_extra("gguf", "export")
    reader = library.GGUFReader
    library.GGUFReader = functools.lru_cache(maxsize=1)(reader)
    try:
        yield
    finally:
        library.GGUFReader = reader
