"""Errors in OpenAI's form: the HTTP status, and the body that describes the error."""

from __future__ import annotations

from typing import Any

from medusa_runtime.errors import (
    ArgumentError,
    CapacityError,
    DeadlineError,
    EngineClosedError,
    InvalidLogitsError,
    PromptError,
    QueueFullError,
    RequestCancelledError,
    RequestError,
    TemplateProcessError,
)

BAD_REQUEST, TOO_MANY_REQUESTS, SERVER_ERROR, UNAVAILABLE, TIMED_OUT = 400, 429, 500, 503, 504

_STATUSES: tuple[tuple[tuple[type[Exception], ...], int], ...] = (  # the first that fits
    ((QueueFullError,), TOO_MANY_REQUESTS),
    ((EngineClosedError,), UNAVAILABLE),
    ((DeadlineError,), TIMED_OUT),
    ((RequestCancelledError, TemplateProcessError), SERVER_ERROR),
    ((ArgumentError, PromptError, RequestError), BAD_REQUEST),  # RequestError itself: parameters forbid every token
)
_TYPES = {BAD_REQUEST: "invalid_request_error", TOO_MANY_REQUESTS: "rate_limit_error"}
_CODES = {TOO_MANY_REQUESTS: "queue_full", UNAVAILABLE: "engine_closed", TIMED_OUT: "deadline_exceeded"}

# Errors of a server whose messages the runtime writes itself. Those of all others may show its paths: they come from
# libraries, name files of the bundle, or are bugs.
_SHOWN = (CapacityError, InvalidLogitsError, QueueFullError, RequestError)


class BodyError(ArgumentError):
    """A body of OpenAI's API is invalid, or asks for what is not supported.

    Attributes:
        param: The field of the body that is wrong; None if several contradict each other.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def status_of(error: BaseException, *, generating: bool = False) -> int:
    """Return the HTTP status of an error.

    It is 400 if the request has to be changed, 429 if too many others wait, 503 if the engine was closed, 504 if the
    deadline passed, and 500 for everything else.

    Args:
        error: The error.
        generating: Whether it ended a request that the engine had accepted; a lack of room is then one of memory, and
            not a prompt that is too long.
    """
    if isinstance(error, CapacityError):
        return SERVER_ERROR if generating else BAD_REQUEST
    return next((status for kinds, status in _STATUSES if isinstance(error, kinds)), SERVER_ERROR)


def error_body(error: BaseException, status: int) -> dict[str, Any]:
    """Return the body that describes an error to a client.

    Messages of errors of the server (status 500) that may have paths or texts of libraries are left out: the body names
    the kind of the error, and whoever runs the server should log it.

    Args:
        error: The error.
        status: Its HTTP status, from `status_of`.
    """
    message, too_long = str(error), status == BAD_REQUEST and isinstance(error, CapacityError)
    if status >= SERVER_ERROR and not isinstance(error, _SHOWN):
        message = f"the server failed to answer ({type(error).__name__}); ask its operator for the reason"
    return {
        "error": {
            "message": message,
            "type": _TYPES.get(status, "server_error"),
            "param": error.param if isinstance(error, BodyError) else None,
            "code": "context_length_exceeded" if too_long else _CODES.get(status),
        }
    }
