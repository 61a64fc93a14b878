"""What a build was made from, small enough to compare in an instant: decides whether there is anything to do."""

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
from medusa_exporter.loading.templates import describe_wanted
from medusa_exporter.models import ModelSource
from medusa_exporter.package_versions import installed_versions

MAKERS = (
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
SHAPING = ("medusa_profiles", "medusa_runtime", "medusa_exporter")  # the packages whose code makes bundles
NOT_SHAPING = ("bench", "cli", "compare", "report", "training")  # folders of theirs whose code does not
SHAPING_THERE = ("compare/tolerances.py",)  # but these files: the limits of a build's validation


def describe_inputs(
    source: ModelSource,
    heads: str,
    graphs: Iterable[str],
    profiles: Iterable[TreeProfile],
    fused: Iterable[str] = (),
    chat_template: str | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """Describe all that a build depends on: files by name, size and time; trees whole; versions and code.

    fused: backends whose graphs have fused operators. chat_template: what was asked for, a name or a file. context: the
    tokens asked for, None for the model's own.
    A hub name stands for itself: whether the hub holds something newer is not asked. Folders enter as a digest, so
    that a bundle does not tell where it was made.
    """
    return {
        "model": _described(source.location, source.gguf, source.files()),
        "heads": _described(heads, None, heads_files(heads)),
        "graphs": sorted(graphs),
        "fused": sorted(fused),
        "context": context,
        "profiles": {profile.name: hashlib.sha256(to_toml(profile).encode()).hexdigest() for profile in profiles},
        "versions": producer_versions(),
        "code": code_digest(),
        "chat_template": describe_wanted(chat_template),
    }


def unchanged_manifest(bundle: Path, sources: dict[str, Any]) -> Manifest | None:
    """Return the manifest of the bundle there if it was made from `sources` and nothing in it was touched since.

    Sizes and times are compared, and contents only of files that came there after the manifest: all are hashed whenever
    the bundle is opened.
    """
    try:
        manifest = read_manifest(bundle)
    except BundleError:
        return None
    return manifest if manifest.sources == sources and is_unchanged(bundle, manifest) else None


def read_manifest(bundle: Path) -> Manifest:
    """Read what a bundle says of itself; its files are not looked at. Raises BundleError."""
    try:
        with (bundle / FILE_NAME).open("rb") as file:
            return Manifest.from_bytes(file.read(MAX_BYTES + 1), str(bundle / FILE_NAME))
    except OSError as error:
        raise BundleError(f"{bundle} is no bundle: {error}; make one with medusa-export build") from None


def producer_versions() -> dict[str, str]:
    """Versions of the packages that shape a bundle."""
    return installed_versions(MAKERS)


def code_digest() -> str:
    """Digest of the code that makes bundles, so that another state of it makes them again, in development too."""
    digest = hashlib.sha256()
    for package in SHAPING:
        spec = importlib.util.find_spec(package)
        for root in sorted(map(Path, (spec.submodule_search_locations or []) if spec else [])):
            for file in sorted(root.rglob("*.py")):
                place = file.relative_to(root)
                if place.parts[0] not in NOT_SHAPING or place.as_posix() in SHAPING_THERE:
                    content = file.read_bytes()
                    digest.update(f"{package}/{place.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _described(location: str, file: str | None, files: list[Path]) -> dict[str, Any]:
    if not files:
        return {"hub": location}
    place = hashlib.sha256(str(Path(location).expanduser().resolve()).encode()).hexdigest()
    return {
        "place": place,
        "file": file,
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
