"""Reads files of requests in OpenAI's batch format, one JSON object a line, without keeping them in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from medusa_profiles.profile import shown
from medusa_runtime.errors import BundleError, MedusaError
from medusa_runtime.openai_format import CHAT, COMPLETIONS
from medusa_runtime.strict_json import parse_json

MAX_LINE = 64 << 20  # bytes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
KEYS = "custom_id, method, url and body"  # of every request
_DIGEST = 16  # bytes that stand for a custom_id where all of them are compared


class BatchError(MedusaError):
    """A file of requests is not valid, or an output does not belong to it."""


@dataclass(frozen=True)
class BatchRequest:
    """One line of a file of requests.

    Attributes:
        line: Number of the line, from 1.
        data: Bytes of the line, without white space at its ends.
        custom_id: Identifies the request in its file.
        url: Endpoint that the body is for.
        body: The body.
    """

    line: int
    data: bytes
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class BatchFacts:
    """What is known of a file of requests after all of it was checked.

    Attributes:
        requests: Number of requests, at least 1.
        first_chat_line: Number of the first line for `/v1/chat/completions`; None if there is none.
        digest: Of all requests, in their order (`digest_of`).
    """

    requests: int
    first_chat_line: int | None
    digest: bytes


def read_requests(file: Path) -> Iterator[BatchRequest]:
    """Yield the requests of a file, one after the other; blank lines are skipped.

    Raises:
        BatchError: A line is not a request; the message names the line.
    """
    with file.open("rb") as opened:
        number = 0
        while line := opened.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise BatchError(f"{file}:{number}: the line has more than {MAX_LINE} bytes; split the request")
            if data := line.removeprefix(BYTE_ORDER_MARK if number == 1 else b"").strip():
                yield _read_request(f"{file}:{number}", number, data)


def check_requests(file: Path) -> BatchFacts:
    """Check a whole file of requests.

    Raises:
        BatchError: A line is not a request, two have the same custom_id, or there is none.
    """
    if not file.is_file():
        raise BatchError(
            f"{file} is not a regular file; expected one, because it is read more than once: save it first"
        )
    lines, digests, first_chat, whole = array("Q"), bytearray(), None, blake2b()
    for request in read_requests(file):
        whole.update(digest_of(request))
        lines.append(request.line)
        digests += blake2b(request.custom_id.encode(), digest_size=_DIGEST).digest()
        if request.url == CHAT and first_chat is None:
            first_chat = request.line
    if not lines:
        raise BatchError(f"{file} holds no requests; expected one JSON object a line, with {KEYS}")
    if pair := _find_equal(np.frombuffer(digests, dtype=f"V{_DIGEST}")):
        first, second = (lines[index] for index in pair)
        raise BatchError(f"{file}:{second}: the custom_id is that of line {first}; expected one that no other line has")
    return BatchFacts(len(lines), first_chat, whole.digest())


def digest_of(request: BatchRequest) -> bytes:
    """Return a digest of one request's line."""
    return blake2b(request.data).digest()


def _find_equal(digests: np.ndarray[Any, Any]) -> tuple[int, int] | None:
    """Return the indices of the first element that equals an earlier one, and of that one; None if all differ."""
    rows = digests.view(np.uint64).reshape(len(digests), -1)  # (N, 2)
    order = np.lexsort(rows.T[::-1])  # stable, so equal elements keep their order
    equal = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
    if not equal.any():
        return None
    at = int(np.flatnonzero(equal)[np.argmin(order[1:][equal])])
    return int(order[at]), int(order[at + 1])


def _read_request(where: str, number: int, data: bytes) -> BatchRequest:
    try:
        return _checked(where, number, data)
    except BundleError as error:
        raise BatchError(f"{error}; expected one JSON object a line") from None
    except RecursionError:
        raise BatchError(f"{where}: too many lists and objects are inside one another; expected fewer") from None


def _checked(where: str, number: int, data: bytes) -> BatchRequest:
    content = parse_json(where, data, MAX_LINE)
    if not isinstance(content, dict):
        raise BatchError(f"{where}: the line is {shown(content)}; expected a JSON object with {KEYS}")
    custom_id, method, url, body = (content.get(key) for key in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id or not _is_unicode(custom_id):
        raise BatchError(f"{where}: custom_id is {shown(custom_id)}; expected a text that no other line has")
    if method != "POST":
        raise BatchError(f"{where}: method is {shown(method)}; expected 'POST'")
    if url not in (CHAT, COMPLETIONS):
        raise BatchError(f"{where}: url is {shown(url)}; expected {CHAT!r} or {COMPLETIONS!r}")
    if not isinstance(body, dict):
        raise BatchError(f"{where}: body is {shown(body)}; expected a JSON object, the body of the request")
    return BatchRequest(number, data, custom_id, str(url), body)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
