"""Mutated bundles, one at a time in one folder: each gives a typed error, or the answer that its content stands for."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutations import apply

PROMPT = [5, 9, 17, 3, 44, 23]
LENGTH = 12  # tokens of an answer
MANIFEST = "manifest.json"
NOT_LOADED = "weights that were not loaded"
LOADED = ("graphs/ort-cpu-fp32.onnx", "graphs/shared.data")  # the graph that answers, and its weights
ENGINE = ("tensorrt", "8.6.0", "sm90")  # what the engine's manifest of the pristine bundle says


@dataclass(frozen=True)
class Context:
    """The bundle's folder, what its files are when nobody has touched them, and the answer that it gives then."""

    folder: Path
    files: dict[str, bytes]
    answer: list[int]


def prepare(state: Path) -> Context:
    """Read the pristine bundle at `state`/bundle, and let it answer."""
    warnings.simplefilter("ignore")
    folder = state / "bundle"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    answers, _ = _answers(folder)
    return Context(folder, files, answers[0])


def run(context: Context, case: dict[str, Any]) -> dict[str, Any]:
    """Apply the case's mutations, open, load and decode, put everything back."""
    changed, places = _changed(context.files, case)
    touched = {name for name in changed.keys() | context.files.keys() if changed.get(name) != context.files.get(name)}
    before = _listing(context.folder.parent)
    try:
        for name in touched:
            _write(context.folder / name, changed.get(name))
        for name, kind in places.items():
            _put(context.folder / name, kind)
        listing = _listing(context.folder.parent)
        empty = {name for name, kind in places.items() if kind == "folder" and name not in changed}  # is no file at all
        seen = {name for name in touched if name != MANIFEST or not case["seal"]} | places.keys() - empty
        found = _outcome(context, seen, places, case)
        if _listing(context.folder.parent) != listing:
            found = {
                "outcome": "litter",
                "detail": f"{sorted(set(_listing(context.folder.parent)) - set(listing))[:3]}",
            }
    finally:
        for name in places:
            _remove(context.folder / name)
        for name in touched | places.keys():
            _write(context.folder / name, context.files.get(name))
    if _listing(context.folder.parent) != before:
        raise RuntimeError("the pristine bundle was not restored")
    return found


def _outcome(context: Context, touched: set[str], places: dict[str, str], case: dict[str, Any]) -> dict[str, Any]:
    from medusa_runtime.errors import MedusaError

    layers: list[str] = []
    try:
        (plain, tree), _ = _answers(context.folder, layers)
    except MedusaError as error:
        if layers[-1] == NOT_LOADED and any(name.startswith(LOADED) for name in touched):
            return {"outcome": "unnoticed", "layer": layers[-1], "detail": f"loaded: {error}"[:300]}
        return {"outcome": "refused", "layer": layers[-1], "detail": f"{type(error).__name__}: {error}"[:300]}
    found = {"outcome": "answered", "layer": "answer", "detail": f"{plain} {tree}"}
    graphs = any(name.startswith("graphs/") for name in touched)
    if touched and not (case["seal"] and touched.isdisjoint(places)):
        return found | {"outcome": "unnoticed"}  # a digest does not hold, and nobody said so
    if plain != tree and not any(name.endswith(".onnx") for name in touched):
        return found | {"outcome": "tree is not plain"}
    if not graphs and plain != context.answer[: len(plain)]:
        return found | {"outcome": "another answer"}
    return found


def _answers(folder: Path, layers: list[str] | None = None) -> tuple[tuple[list[int], list[int]], str]:
    """Open and load all of a bundle; return plain decoding's tokens, a tree's, and an answer to a text."""
    from medusa_runtime import Bundle, Decoder
    from medusa_runtime.backends import load_backend
    from medusa_runtime.prompt_encoder import PromptEncoder

    def at(layer: str) -> None:
        if layers is not None:
            layers.append(layer)

    at("manifest")
    bundle = Bundle.open(folder)
    at("tokenizer")
    encoder = PromptEncoder(bundle)
    encoder.encode("the tree of the heads", raw=True)
    if encoder.has_chat_template:
        encoder.encode([{"role": "user", "content": "the steps of the tree"}])
    at("profile")
    trees = bundle.profiles()
    at("engine")
    if any(graph.backend == ENGINE[0] for graph in bundle.manifest.graphs.values()):
        for facts, path in bundle.engines(ENGINE[0]):
            facts.read(path, *ENGINE)
    at("graph")
    backend = load_backend(bundle, "ort-cpu", None, 1)
    decoder = Decoder(backend)
    plain = _decoded(decoder)
    tree = plain
    for profile in list(trees.values())[-1:]:
        decoder.set_profile(profile)
        tree = _decoded(decoder)
    at("text")
    text = encoder.tokenizer.decode(plain)
    at(NOT_LOADED)
    Bundle.open(folder, weights=True)
    return (plain, tree), text


def _decoded(decoder: Any) -> list[int]:
    tokens = list(decoder.start(PROMPT, LENGTH))
    while decoder.sequence.finish_reason is None:
        tokens += decoder.step()
    return tokens


def _changed(files: dict[str, bytes], case: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return all files after the case's mutations, their digests made to fit where the case says so.

    Then, by name, what stands in the place of a file: "folder", "pipe", or the target of a link.
    """
    changed, places = dict(files), dict[str, str]()
    for name, mutation in case["mutations"]:
        if mutation["kind"] == "remove":
            changed.pop(name, None)
        elif mutation["kind"] == "place":
            places[mutation["beside"].format(name=name)] = mutation["as"]
        elif name in changed:
            changed[name] = apply(mutation, changed[name], name, files)
    if case["seal"] and MANIFEST in changed:
        changed[MANIFEST] = sealed(changed)
    return changed, places


def sealed(files: dict[str, bytes]) -> bytes:
    """Return the manifest with sizes and digests that fit the files, as someone would make it who means harm."""
    data = files[MANIFEST]
    try:
        content = json.loads(data)
        listed = content["files"]
        for name in [name for name in listed if name not in files]:
            del listed[name]
        for name, facts in listed.items():
            facts["size"] = len(files[name])
            facts["sha256"] = hashlib.sha256(files[name]).hexdigest()
        _seal_engines(files, listed)
        content["digest"] = "0" * 64
        data = json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False).encode() + b"\n"
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # no manifest any more: what is left of it gets a digest all the same
    start = data.find(b'"digest": "') + len(b'"digest": "')
    data = data[:start] + b"0" * 64 + data[start + 64 :]
    return data[:start] + hashlib.sha256(data).hexdigest().encode() + data[start + 64 :]


def _seal_engines(files: dict[str, bytes], listed: dict[str, Any]) -> None:
    """Let an engine's own manifest name the engine's bytes as they are now."""
    for name in [one for one in listed if one.startswith("engines/") and one.endswith(".engine")]:
        beside = name.removesuffix(".engine") + ".json"
        try:
            facts = json.loads(files[beside])
            facts["engine"] = hashlib.sha256(files[name]).hexdigest()
        except (KeyError, ValueError, TypeError):
            continue
        files[beside] = json.dumps(facts, indent=2, sort_keys=True).encode() + b"\n"
        if beside in listed:
            listed[beside] = {"size": len(files[beside]), "sha256": hashlib.sha256(files[beside]).hexdigest()}


def _put(path: Path, kind: str) -> None:
    """Make a folder, a pipe or a link where a file was, or where none was."""
    _remove(path)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.write_bytes(b"not listed")
    else:
        path.symlink_to(kind)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(data)


def _listing(folder: Path) -> list[str]:
    """Everything below a folder, and the scratch folder's content."""
    scratch = Path(os.environ["TMPDIR"])
    return sorted(str(path) for place in (folder, scratch) for path in place.rglob("*"))
