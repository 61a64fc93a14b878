"""Writes a bundle's manifest: hashes every file of the folder, then writes the manifest as the last file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medusa_runtime.bundle_files import SCRATCH, hash_files, resolve_inside, walk
from medusa_runtime.errors import BundleError
from medusa_runtime.facts import FileFacts, GraphFacts, HeadFacts, ModelFacts
from medusa_runtime.field_checks import check_path
from medusa_runtime.graph_check import GraphCheck
from medusa_runtime.manifest import FILE_NAME, SCHEMA, Manifest


def write_manifest(
    folder: Path,
    *,
    producer: dict[str, str],
    model: ModelFacts,
    heads: HeadFacts,
    graphs: dict[str, GraphFacts],
    profiles: Iterable[str],
    sources: dict[str, Any],
    graph_checks: Mapping[str, GraphCheck] | None = None,
    known: Mapping[str, FileFacts] | None = None,
) -> Manifest:
    """Hash every file in a folder, then write its manifest atomically.

    Args:
        folder: The bundle's folder, complete but for the manifest.
        producer: Packages that built the bundle, with their versions.
        model: The decoder's name and sizes.
        heads: The number and form of the heads.
        graphs: Graphs, by key.
        profiles: Names of the trees.
        sources: JSON that the builder records for itself.
        graph_checks: Result of validating each graph, by file; graphs that were not validated are left out.
        known: Size and digest of files that need not be hashed again, by name.

    Raises:
        BundleError: A file cannot be part of a bundle, or the facts contradict each other.
    """
    root = folder.resolve(strict=True)
    (root / SCRATCH).unlink(missing_ok=True)  # left by an interrupted run
    names = sorted(set(walk(root)) - {FILE_NAME})
    for name in names:
        check_path("a file's path", name)
    paths = {name: resolve_inside(root, name) for name in names if name not in (known or {})}
    hashed = zip(paths, hash_files([*paths.values()]), strict=True)
    files = dict(known or {}) | {name: FileFacts(paths[name].stat().st_size, digest) for name, (digest, _) in hashed}
    manifest = Manifest(
        schema=SCHEMA,
        producer=producer,
        model=model,
        heads=heads,
        graphs=graphs,
        profiles=tuple(profiles),
        files={name: files[name] for name in names},
        sources=sources,
        graph_checks=dict(graph_checks or {}),
    )
    with (root / SCRATCH).open("wb") as file:
        file.write(manifest.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    (root / SCRATCH).replace(root / FILE_NAME)
    return manifest


def rewrite_manifest(folder: Path, manifest: Manifest, known: Mapping[str, FileFacts] | None = None) -> Manifest:
    """Write the manifest of a folder whose files have changed; everything but `files` is copied from `manifest`.

    Args:
        folder: The bundle's folder.
        manifest: Its manifest so far.
        known: Size and digest of files that need not be hashed again, by name.

    Raises:
        BundleError: As for `write_manifest`.
    """
    return write_manifest(
        folder,
        producer=manifest.producer,
        model=manifest.model,
        heads=manifest.heads,
        graphs=manifest.graphs,
        profiles=manifest.profiles,
        sources=manifest.sources,
        graph_checks=manifest.graph_checks,
        known=known,
    )


def is_unchanged(folder: Path, manifest: Manifest) -> bool:
    """Whether a folder appears unchanged since its manifest was written; most files are not hashed.

    It must have the listed files and no others, each of the listed size and not modified after the manifest. A file
    whose metadata changed after it, such as a copy that keeps the modification time of its source, is hashed.
    """
    try:
        root = folder.resolve(strict=True)
        sealed = resolve_inside(root, FILE_NAME).stat()
        if set(walk(root)) != {FILE_NAME, *manifest.files}:
            return False
        moved = {}
        for name, facts in manifest.files.items():
            status = (path := resolve_inside(root, name)).stat()
            if status.st_size != facts.size or status.st_mtime_ns > sealed.st_mtime_ns:
                return False
            if status.st_ctime_ns > sealed.st_ctime_ns:
                moved[path] = facts.sha256
        return [digest for digest, _ in hash_files(moved)] == [*moved.values()]
    except (OSError, BundleError):
        return False
