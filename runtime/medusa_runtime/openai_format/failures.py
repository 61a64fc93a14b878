"""Errors in OpenAI's form: the HTTP status, and the body that describes the error."""

from __future__ import annotations

from typing import Any

from medusa_runtime.errors import (
    ArgumentError,
    CapacityError,
    DeadlineError,
    EngineClosedError,
    MedusaError,
    PromptError,
    RequestCancelledError,
    RequestError,
    TemplateProcessError,
)

BAD_REQUEST, SERVER_ERROR = 400, 500


class BodyError(ArgumentError):
    """A body of OpenAI's API is invalid, or asks for what is not supported.

    Attributes:
        param: The field of the body that is wrong; None if several contradict each other.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def status_of(error: BaseException, *, generating: bool = False) -> int:
    """Return the HTTP status of an error: 400 if the request has to be changed, otherwise 500.

    Args:
        error: The error.
        generating: Whether it ended a request that the engine had accepted; a lack of room is then one of memory, and
            not a prompt that is too long.
    """
    if isinstance(error, CapacityError):
        return SERVER_ERROR if generating else BAD_REQUEST
    if isinstance(error, RequestError):  # the base class itself: the parameters forbid every token
        ended = isinstance(error, (DeadlineError, EngineClosedError, RequestCancelledError))
        return SERVER_ERROR if ended else BAD_REQUEST
    if isinstance(error, TemplateProcessError):
        return SERVER_ERROR
    return BAD_REQUEST if isinstance(error, (ArgumentError, PromptError)) else SERVER_ERROR


def error_body(error: BaseException, status: int) -> dict[str, Any]:
    """Return the body that describes an error.

    Args:
        error: The error.
        status: Its HTTP status, from `status_of`.
    """
    is_bad_request = status == BAD_REQUEST
    too_long = is_bad_request and isinstance(error, CapacityError)
    known = isinstance(error, MedusaError)
    return {
        "error": {
            "message": str(error) if known else f"unexpected {type(error).__name__}: {error}",
            "type": "invalid_request_error" if is_bad_request else "server_error",
            "param": error.param if isinstance(error, BodyError) else None,
            "code": "context_length_exceeded" if too_long else None,
        }
    }
