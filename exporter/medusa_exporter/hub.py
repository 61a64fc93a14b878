"""Revisions of repositories on the Hugging Face hub: branches, tags and commits."""

from __future__ import annotations

from pathlib import Path

from medusa_runtime.errors import UnsupportedModelError


def check_revision(revision: str, source: str, option: str) -> None:
    """Refuse a revision of something that is not on the hub.

    Args:
        revision: What was asked for.
        source: A hub name, or a local file or folder.
        option: The option that asked for it, for the message.

    Raises:
        UnsupportedModelError: `source` is local, or the revision is empty.
    """
    path = Path(source).expanduser()
    if path.exists():
        kind = "folder" if path.is_dir() else "file"
        raise UnsupportedModelError(
            f"{source}: {option} {revision!r} was given for a local {kind}; expected a hub name 'owner/name', since "
            f"only repositories of the hub have revisions: leave out {option}"
        )
    if not revision.strip():
        raise UnsupportedModelError(f"{option} is empty; expected a branch, a tag or a commit, such as main")


def pin_revision(heads: str, revision: str | None, option: str = "--heads-revision") -> str:
    """Return the name of hub heads at a revision, such as `owner/name@v2`; without a revision `heads` as it is.

    Raises:
        UnsupportedModelError: A revision was asked for of local heads.
    """
    if revision is None:
        return heads
    check_revision(revision, heads, option)
    return f"{heads}@{revision}"


def split_revision(name: str) -> tuple[str, str | None]:
    """Split a hub name such as `owner/name@v2` into repository and revision, `None` for the main branch."""
    repository, _, revision = name.partition("@")
    return repository, revision or None
