"""Reuses the engines of a bundle that is being replaced, if their graphs and weights are the same in the new one."""

from __future__ import annotations

from pathlib import Path

from medusa_runtime.backends.onnx_file import read_contents
from medusa_runtime.engine_manifest import EngineManifest
from medusa_runtime.errors import BundleError
from medusa_runtime.facts import FileFacts

from medusa_exporter.engines import FOLDER
from medusa_exporter.files import sha256
from medusa_exporter.publish import link_or_copy


def external_files(bundle: Path, graph: str) -> list[str]:
    """Return the paths of all files with weights of a graph, sorted. Raises BundleError, OSError."""
    contents = read_contents((bundle / graph).read_bytes(), str(bundle / graph))
    places = {weight.external.file for weight in contents.weights if weight.external}
    return sorted(f"{Path(graph).parent.as_posix()}/{file}" for file in places)


def reuse_engines(old: Path, new: Path) -> tuple[list[str], dict[str, FileFacts]]:
    """Copy or link engines of the bundle `old` whose graphs and weights are unchanged into the folder `new`.

    An engine that cannot be read or is damaged is not copied: the runtime would refuse it.

    Args:
        old: The bundle that is being replaced, which need not exist.
        new: Folder of the new bundle, which is not sealed yet.

    Returns:
        The engines' names, and the size and digest of each file that was hashed, which need not be hashed again.
    """
    kept, hashed = [], dict[str, FileFacts]()
    for file in sorted((old / FOLDER).glob("*.json")):
        graph, engine = f"graphs/{file.stem}.onnx", file.with_suffix(".engine")
        try:
            facts = EngineManifest.from_file(file)
            needed = [graph, *external_files(new, graph)]
            for name in needed:
                hashed.setdefault(name, _facts(new / name))
            if facts.changed(graph, hashed) or {name for name, _ in facts.weights} != set(needed[1:]):
                continue
            found = _facts(engine)
        except (BundleError, OSError):
            continue
        if found.sha256 != facts.engine:
            continue
        for one in (file, engine, *(old / FOLDER).glob("*.cache")):
            if not (target := new / FOLDER / one.name).exists():
                link_or_copy(one.resolve(), target)
        hashed[f"{FOLDER}/{engine.name}"] = found
        kept.append(file.stem)
    return kept, hashed


def _facts(file: Path) -> FileFacts:
    return FileFacts(file.stat().st_size, sha256(file))
