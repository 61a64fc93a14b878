"""Identifies responses by all that they depend on, so that an interrupted batch resumes only where that is the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from medusa_exporter.output_kinds import BATCH_ID


@dataclass(frozen=True)
class BatchIdentity:
    """What the responses of a batch depend on, except their requests.

    Attributes:
        bundle: Digest of the bundle, in hexadecimal digits.
        settings: JSON values: precision, parameters and so on.
    """

    bundle: str
    settings: Mapping[str, Any]

    def request_id(self, data: bytes) -> str:
        """Return what identifies the response to a line of the file of requests."""
        return f"{self._start}{_digest(data, 16)}"

    def describe_difference(self, found: str, request_id: str) -> str | None:
        """Describe how the id of a response differs from the expected one; None if they are equal."""
        if found == request_id:
            return None
        mine, other = (text.split("-") for text in (request_id, found))
        parts = ("another bundle", "another precision or other parameters", "another request")
        if len(mine) == len(other):
            for part, here, there in zip(parts, mine, other, strict=True):
                if here != there:
                    return part
        return "something else"

    @property
    def _start(self) -> str:
        settings = json.dumps(self.settings, sort_keys=True, ensure_ascii=True)
        return f"{self.bundle[:12]}-{_digest(settings.encode(), 6)}-"


def line_id(request_id: str) -> str:
    """Return the id of an output line."""
    return f"{BATCH_ID}{request_id}"


def seed_of(data: bytes) -> int:
    """Return the seed of a request that has none: the same for the same line of the file of requests."""
    return int.from_bytes(blake2b(data, digest_size=8, person=b"seed").digest(), "little")


def _digest(data: bytes, size: int) -> str:
    return blake2b(data, digest_size=size).hexdigest()
