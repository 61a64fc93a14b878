"""Describes all inputs of a build, to decide whether a bundle is up to date."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medusa_profiles.profile import TreeProfile
from medusa_profiles.toml import to_toml
from medusa_runtime.bundle import is_unchanged
from medusa_runtime.errors import BundleError
from medusa_runtime.manifest import FILE_NAME, MAX_BYTES, Manifest

from medusa_exporter.heads.architecture import heads_files
from medusa_exporter.hub import split_revision
from medusa_exporter.loading.templates import describe_wanted
from medusa_exporter.models import ModelSource
from medusa_exporter.package_versions import installed_versions

PRODUCERS = (  # packages whose versions a bundle depends on
    "medusa-export",
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "gguf",
    "numpy",
    "ml_dtypes",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
)
CODE_PACKAGES = ("medusa_profiles", "medusa_runtime", "medusa_exporter")  # packages whose code a bundle depends on
CODE_EXCLUDED = ("bench", "cli", "compare", "report", "training")  # but for the code in these folders
CODE_INCLUDED = ("compare/tolerances.py",)  # except for these files: the limits of a build's validation


def describe_inputs(
    source: ModelSource,
    heads: str | None,
    graphs: Iterable[str],
    profiles: Iterable[TreeProfile],
    fused: Iterable[str] = (),
    chat_template: str | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """Describe all inputs of a build: files by name, size and time; trees by content; versions and code by digest.

    A hub name stands for itself and its revision: whether the hub has something newer is not checked. The
    path of a folder is hashed, so that a bundle does not reveal where it was built.

    Args:
        source: The decoder.
        heads: Folder or hub name of the heads; None for none.
        graphs: Paths of the graph files in the bundle.
        profiles: The bundle's tree profiles.
        fused: Backends whose graphs have fused operators.
        chat_template: Name or file of the chat template that was asked for.
        context: Number of tokens that was asked for; None for the model's own.
    """
    return {
        "model": _described(source.location, source.gguf, source.files(), source.revision),
        "heads": None if heads is None else _described(heads, None, heads_files(heads)),
        "graphs": sorted(graphs),
        "fused": sorted(fused),
        "context": context,
        "profiles": {profile.name: hashlib.sha256(to_toml(profile).encode()).hexdigest() for profile in profiles},
        "versions": producer_versions(),
        "code": code_digest(),
        "chat_template": describe_wanted(chat_template),
    }


def unchanged_manifest(bundle: Path, sources: dict[str, Any]) -> Manifest | None:
    """Return the manifest of a bundle that was built from `sources` and has not been changed since, else None.

    Sizes and times are compared, and the content only of files that are newer than the manifest; all files are hashed
    whenever the bundle is opened.
    """
    try:
        manifest = read_manifest(bundle)
    except BundleError:
        return None
    return manifest if manifest.sources == sources and is_unchanged(bundle, manifest) else None


def read_manifest(bundle: Path) -> Manifest:
    """Read a bundle's manifest, without checking its files. Raises BundleError."""
    try:
        with (bundle / FILE_NAME).open("rb") as file:
            return Manifest.from_bytes(file.read(MAX_BYTES + 1), str(bundle / FILE_NAME))
    except OSError as error:
        raise BundleError(f"{bundle} is not a bundle: {error}; make one with medusa-export build") from None


def producer_versions() -> dict[str, str]:
    """Return the versions of the packages that a bundle depends on."""
    return installed_versions(PRODUCERS)


def code_digest() -> str:
    """Return a digest of the code that builds bundles, so that any change of it causes a new build."""
    digest = hashlib.sha256()
    for package in CODE_PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in sorted(map(Path, (spec.submodule_search_locations or []) if spec else [])):
            for file in sorted(root.rglob("*.py")):
                place = file.relative_to(root)
                if place.parts[0] not in CODE_EXCLUDED or place.as_posix() in CODE_INCLUDED:
                    content = file.read_bytes()
                    digest.update(f"{package}/{place.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _described(location: str, file: str | None, files: list[Path], revision: str | None = None) -> dict[str, Any]:
    if not files:
        repository, pinned = split_revision(location)
        return {"hub": repository, **({"revision": revision or pinned} if revision or pinned else {})}
    place = hashlib.sha256(str(Path(location).expanduser().resolve()).encode()).hexdigest()
    return {
        "place": place,
        "file": file,
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
