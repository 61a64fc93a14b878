"""Refuses versions of optional packages that are too old."""

from __future__ import annotations

from medusa_runtime.errors import MissingExtraError


def check_version(name: str, version: str, least: tuple[int, int], command: str, reason: str = "") -> None:
    """Check the installed version of a package.

    Args:
        name: Name of the package.
        version: Its version, such as "1.32.0".
        least: Major and minor number of the oldest version that works.
        command: The pip command that installs a newer one.
        reason: What is wrong with older ones, with a semicolon and a space behind it.

    Raises:
        MissingExtraError: It is too old.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < least:
        expected = ".".join(map(str, least))
        raise MissingExtraError(f"{name} {version} is too old, {reason}expected {expected} or newer: {command}")
