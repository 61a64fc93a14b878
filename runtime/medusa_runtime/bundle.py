"""Bundles: folders with a model's graphs, weights, tokenizer and trees, checked against a manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.toml import from_toml

from medusa_runtime.arguments import as_optional_text, as_path
from medusa_runtime.bundle_files import IGNORED_NAMES, hash_files, read_bounded, resolve_inside, walk
from medusa_runtime.engine_manifest import MAX_BYTES as MAX_ENGINE_MANIFEST
from medusa_runtime.engine_manifest import EngineManifest
from medusa_runtime.errors import BundleError
from medusa_runtime.facts import DIGEST, GraphFacts, HeadFacts, ModelFacts
from medusa_runtime.manifest import FILE_NAME, MAX_BYTES, REMEDY, Manifest
from medusa_runtime.manifest_writer import is_unchanged, rewrite_manifest, write_manifest
from medusa_runtime.strict_json import describe_json_error
from medusa_runtime.verified_file import FileStamp, VerifiedFile, is_stamped

__all__ = [
    "IGNORED_NAMES",
    "Bundle",
    "named_template_path",
    "rewrite_manifest",
    "write_manifest",
    "is_unchanged",
    "walk",
]

TOKENIZER = "tokenizer/tokenizer.json"
CHAT_TEMPLATE = "tokenizer/chat_template.jinja"
SPECIAL_TOKENS = "tokenizer/special_tokens.json"
_NAMED_TEMPLATES = "tokenizer/chat_templates/"

# maximum number of bytes of each kind of file that is read as a whole
MAX_TOKENIZER, MAX_TEMPLATE, MAX_SPECIAL_TOKENS, MAX_PROFILE = 256 << 20, 4 << 20, 1 << 20, 1 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Small files were checked against the manifest when it was opened, weights are while they load.

    Example::

        bundle = Bundle.open("bundle")
        print(bundle.model.context, list(bundle.profiles()))
        backend = load_backend(bundle, "ort-cpu")

    Attributes:
        root: The bundle's folder, as an absolute path without links.
        manifest: The checked manifest.
        stamps: File system metadata of each file at the time it was hashed, by name; `verify` adds to it.
    """

    root: Path
    manifest: Manifest
    stamps: dict[str, FileStamp | None] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path, *, weights: bool = False, expected_digest: str | None = None) -> Bundle:
        """Check a bundle and return it; nothing of it is loaded before.

        The manifest must be valid, every file that it lists must be a regular file inside the folder with the listed
        size and SHA-256, and the folder must not contain any other file. Weights and TensorRT engines, nearly all of a
        bundle's bytes, are hashed when they are loaded: a process seldom loads all of them.

        Args:
            folder: The bundle's folder.
            weights: Whether to hash weights and engines now, too, so that damage is found before long work begins.
            expected_digest: SHA-256 that the manifest must have, and thereby every byte of the bundle; None accepts
                any. It is compared before any other file is read.

        Raises:
            BundleError: The bundle is missing or damaged, or has another digest.
            ArgumentError: An argument has a wrong type.
        """
        folder = as_path("the bundle", folder)
        if expected_digest != "":  # which is rejected below, as it is no digest
            as_optional_text("expected_digest", expected_digest)
        if not folder.is_dir():
            raise BundleError(f"no such bundle: {folder} is not a folder; make one with medusa-export build")
        try:
            root = folder.resolve()
            if not (root / FILE_NAME).exists():
                raise BundleError(f"{folder} is not a bundle, it has no {FILE_NAME}; {REMEDY}")
            data = read_bounded(resolve_inside(root, FILE_NAME), MAX_BYTES)
            manifest = Manifest.from_bytes(data, str(folder / FILE_NAME))
            _check_digest(folder, manifest.digest, expected_digest)
            present = set(walk(root)) - {FILE_NAME}
            if unlisted := sorted(present - manifest.files.keys()):
                raise BundleError(f"{folder} holds {unlisted[0]!r}, which its manifest does not list; remove it")
            paths = {name: resolve_inside(root, name) for name in manifest.files}
            for name, facts in manifest.files.items():
                if (size := paths[name].stat().st_size) != facts.size:
                    raise BundleError(f"{folder / name} has {size} bytes, expected {facts.size}; {REMEDY}")
        except OSError as error:
            raise BundleError(f"{folder} cannot be read: {error}; {REMEDY}") from error
        bundle = cls(root, manifest)
        bundle.verify(name for name in manifest.files if weights or not _is_large(name))
        return bundle

    def verify(self, names: Iterable[str]) -> None:
        """Hash files in parallel, except those that are as they were; raise BundleError for the first damaged one."""
        todo = [name for name in names if not is_stamped(self.root / name, self.stamps.get(name))]
        try:
            for name, (digest, stamp) in zip(todo, hash_files([self.root / name for name in todo]), strict=True):
                if digest != (wanted := self.manifest.files[name].sha256):
                    raise BundleError(f"{self.root / name} has SHA-256 {digest}, expected {wanted}; {REMEDY}")
                self.stamps[name] = stamp
        except OSError as error:
            raise BundleError(f"{self.root} cannot be read: {error}; {REMEDY}") from error

    @property
    def model(self) -> ModelFacts:
        """The decoder's sizes."""
        return self.manifest.model

    @property
    def heads(self) -> HeadFacts:
        """The number and form of the Medusa heads."""
        return self.manifest.heads

    def file(self, name: str) -> VerifiedFile:
        """Return a file to be read or mapped, verified against the manifest; BundleError if that does not list it."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.root} has no {name!r}: its manifest does not list it; {REMEDY}")
        facts, stamp = self.manifest.files[name], self.stamps.get(name)
        return VerifiedFile(self.root / name, facts, stamp, lambda hashed: self.stamps.update({name: hashed}))

    def graph(self, backend: str, precision: str | None = None) -> tuple[GraphFacts, Path]:
        """Return the facts and the file of a backend's graph.

        Args:
            backend: Name of the backend.
            precision: Name of the precision; None is the only one there is, or fp32 among several.

        Raises:
            BundleError: There is no such graph; the message lists those there are.
        """
        found = {facts.precision: facts for facts in self.manifest.graphs.values() if facts.backend == backend}
        wanted = precision or (next(iter(found)) if len(found) == 1 else "fp32")
        if wanted not in found:
            asked = f"backend {backend}, precision {wanted}" if precision or found else f"backend {backend}"
            raise BundleError(
                f"{self.root} has no graph for {asked}; it has {', '.join(sorted(self.manifest.graphs))}; choose one "
                "of these, or build the bundle again with --backend and --precision"
            )
        return found[wanted], self.root / found[wanted].file

    def engines(self, backend: str, precision: str | None = None) -> list[tuple[EngineManifest, Path]]:
        """Return the manifest and the file, unread, of each TensorRT engine that was built from a backend's graphs.

        Raises:
            BundleError: An engine's manifest belongs to another engine, or the engine was built from another graph or
                other weights than those of the bundle.
        """
        graph, _ = self.graph(backend, precision)
        found = []
        for name in self.manifest.files:
            if name.startswith(f"engines/{graph.key}-") and name.endswith(".json"):
                facts = EngineManifest.from_bytes(self.file(name).read(MAX_ENGINE_MANIFEST), self.root / name)
                engine = name.removesuffix(".json") + ".engine"
                listed = self.manifest.files.get(engine)
                stated = facts.flavour, facts.precision, facts.engine
                if listed is None or stated != (backend, graph.precision, listed.sha256):
                    raise BundleError(f"{self.root / name} describes another engine than {engine}; {REMEDY}")
                if changed := facts.changed(f"graphs/{Path(engine).stem}.onnx", self.manifest.files):
                    raise BundleError(
                        f"{self.root / engine} was built from another {changed} than the bundle's: it would compute "
                        f"another model or other heads; build it again: medusa-export engines {self.root}"
                    )
                found.append((facts, self.root / engine))
        return found

    def profile(self, name: str) -> TreeProfile:
        """Read a tree and check that the heads can serve it.

        Raises:
            BundleError: There is no such tree (the message lists those there are), or it is invalid.
        """
        if name not in self.manifest.profiles:
            names = ", ".join(self.manifest.profiles)
            if name == "plain":
                remedy = "plain decoding has no tree: leave the name out"
            elif not self.heads.count:
                remedy = "this bundle has no heads: use plain decoding, or build with --heads"
            else:
                has = f"it has {names}: name one of these" if names else "it has none: use plain decoding"
                remedy = f"{has}, or build the bundle again with --profile NAME"
            raise BundleError(f"{self.root} has no profile {name!r:.80}; {remedy}")
        path = f"profiles/{name}.toml"
        try:
            tree = from_toml(self._read_text(path, MAX_PROFILE), str(self.root / path))
            tree.check_fits(self.heads.count, self.heads.top_k)
        except ProfileError as error:
            raise BundleError(f"profile {name!r} of {self.root} cannot be used: {error}") from error
        if tree.name != name:
            raise BundleError(f"{self.root / path} holds a tree named {tree.name!r}, expected {name!r}; {REMEDY}")
        return tree

    def profiles(self) -> dict[str, TreeProfile]:
        """Read all trees, by name, in the order of the manifest."""
        return {name: self.profile(name) for name in self.manifest.profiles}

    @property
    def tokenizer(self) -> bytes:
        """The bytes of `tokenizer.json`, for the `tokenizers` library; BundleError if there is none."""
        if TOKENIZER not in self.manifest.files:
            raise BundleError(f"{self.root} has no tokenizer: its manifest does not list {TOKENIZER}; {REMEDY}")
        return self.file(TOKENIZER).read(MAX_TOKENIZER)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, or None."""
        return self._read_text(CHAT_TEMPLATE, MAX_TEMPLATE) if CHAT_TEMPLATE in self.manifest.files else None

    @property
    def chat_template_names(self) -> list[str]:
        """The names of the model's chat templates where it has several, sorted; often empty."""
        found = (name for name in self.manifest.files if name.startswith(_NAMED_TEMPLATES) and name.endswith(".jinja"))
        return sorted(name.removeprefix(_NAMED_TEMPLATES).removesuffix(".jinja") for name in found)

    def named_chat_template(self, name: str) -> str:
        """Return one of the model's named chat templates; raise BundleError listing the names otherwise."""
        if name not in self.chat_template_names:
            names = self.chat_template_names
            has = f"it has {', '.join(names)}; name one of these" if names else "it has none with a name; leave it out"
            raise BundleError(
                f"{self.root} has no chat template {name!r:.80}; {has}, or build the bundle again with --chat-template"
            )
        return self._read_text(named_template_path(name), MAX_TEMPLATE)

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens that the chat template may use: "bos_token", "eos_token" and so on, each with its text."""
        if SPECIAL_TOKENS not in self.manifest.files:
            return {}
        try:
            content = json.loads(self._read_text(SPECIAL_TOKENS, MAX_SPECIAL_TOKENS))
        except (ValueError, RecursionError, MemoryError) as error:
            raise BundleError(
                f"{self.root / SPECIAL_TOKENS} is not valid JSON: {describe_json_error(error)}; {REMEDY}"
            ) from None
        if not isinstance(content, dict) or not all(isinstance(token, str) for token in content.values()):
            raise BundleError(f"{self.root / SPECIAL_TOKENS} must map names to texts; {REMEDY}")
        return content

    def _read_text(self, name: str, most: int) -> str:
        try:
            return self.file(name).read(most).decode()
        except UnicodeDecodeError as error:
            raise BundleError(f"{self.root / name} cannot be read: {error}; {REMEDY}") from None


def _check_digest(folder: Path, got: str, expected: str | None) -> None:
    if expected is not None and not DIGEST.fullmatch(expected):
        raise BundleError(
            f"the expected digest is {expected!r:.80}, expected 64 hexadecimal digits in lower case, as "
            f"medusa-export inspect shows them"
        )
    if expected not in (None, got):
        raise BundleError(
            f"{folder} has the digest {got}, expected {expected}: it is not the bundle that was pinned; "
            "fetch that one, or pin this digest if it is intended"
        )


def named_template_path(name: str) -> str:
    """Return the path inside a bundle of the named chat template `name`."""
    return f"{_NAMED_TEMPLATES}{name}.jinja"


def _is_large(name: str) -> bool:
    """Whether a file has weights: it is hashed when it is loaded."""
    return name.startswith(("engines/", "graphs/")) and name.endswith((".engine", ".data"))
