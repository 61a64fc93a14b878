"""The rule by which long commands resume: what an earlier run saved counts only for the same arguments and inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

MAX_VALUE_LENGTH = 40  # characters of a value in a message


def describe_differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Describe the values that differ between the settings of an earlier run and those of this one.

    Args:
        saved: Settings of the earlier run, as read from JSON; values may be nested mappings.
        wanted: Settings of this run.

    Returns:
        One line such as `batch was 64, is 128; data was another`, empty if all values are equal.
    """
    return "; ".join(_differing(saved, json.loads(json.dumps(wanted)), ""))


def _differing(saved: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in sorted(saved.keys() | wanted.keys()):
        was, now = saved.get(key), wanted.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differing(was, now, f"{prefix}{key}.")
        elif was != now:
            shown = [json.dumps(value, ensure_ascii=False) for value in (was, now)]
            short = all(len(text) <= MAX_VALUE_LENGTH for text in shown)
            yield f"{prefix}{key} was {shown[0]}, is {shown[1]}" if short else f"{prefix}{key} was another"
