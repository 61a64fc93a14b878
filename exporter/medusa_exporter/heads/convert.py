"""Converts heads of any published layout to `medusa_lm_head.safetensors` and `config.json`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa_exporter.heads.architecture import HeadArchitecture, infer_architecture
from medusa_exporter.heads.base_model import BASE_KEY, base_model_mismatch, model_names
from medusa_exporter.heads.compatibility import check_sizes
from medusa_exporter.heads.config import read_heads_config, warn_of_mismatches
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.files import CONFIG_NAME, WEIGHTS_NAME, pickle_file
from medusa_exporter.heads.headers import find_heads, read_header
from medusa_exporter.heads.layouts import MAP_NAME, Layout, canonical_names, detect_layout
from medusa_exporter.heads.pickles import check_types, read_pickle
from medusa_exporter.heads.storage import (
    add_zero_biases,
    check_values,
    read_taps,
    read_tensors,
    read_weights,
    select_draft_rows,
    write_tensors,
)
from medusa_exporter.heads.taps import check_taps
from medusa_exporter.heads.vocabulary_padding import scored_tokens
from medusa_exporter.output_kinds import CONVERTED
from medusa_exporter.overwrite_check import check_output_folder

# Names of a decoder's lm_head; the last one if it is tied to the embedding
LM_HEADS = ("lm_head.weight", "embed_out.weight", "model.embed_tokens.weight")


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        facts: Architecture of the heads as written.
        layout: The layout that was read.
        shared: Whether the heads' lm_heads equalled the model's and were left out.
    """

    facts: HeadArchitecture
    layout: Layout
    shared: bool


def convert(source: str | Path, folder: Path, *, base: Path | None = None, force: bool = False) -> Conversion:
    """Convert heads to the layout that `save_heads` writes; every weight keeps its type and values.

    Args:
        source: A folder, a hub name or a pickle (.pt, .pth, .bin).
        folder: The folder to write to.
        base: Folder of the model that the heads belong to. Their sizes are checked against it, and lm_heads that equal
            its own are left out, because heads without an lm_head share the model's.
        force: Overwrite converted heads in `folder`.

    Returns:
        What was converted.

    Raises:
        HeadsError: `source` has no valid heads, they do not fit `base`, or `folder` has heads already.
    """
    _check_target(source, folder, force)
    where, layout, tensors = _read(source)
    facts = infer_architecture({name: tuple(tensor.shape) for name, tensor in tensors.items()}, where)
    config = read_heads_config(source)
    sizes = _base_sizes(base) if base else None
    if sizes:
        check_sizes(facts, *sizes, source)
    vocab_size = sizes[1] if sizes else _vocab_size(facts, config)
    check_values(tensors, where, None if vocab_size is None else scored_tokens(facts, vocab_size))
    warn_of_mismatches(source, layout, facts, vocab_size, read_taps(tensors))
    if base:
        if isinstance(layers := read_heads_config(base).get("num_hidden_layers"), int):
            check_taps(read_taps(tensors), layers, str(source))
        if other := base_model_mismatch(source, model_names(base)):
            warnings.warn(other, stacklevel=2)
    tensors = select_draft_rows(tensors)
    shared = base is not None and _is_the_models(tensors, facts, base)
    if shared:
        tensors = {name: tensor for name, tensor in tensors.items() if not _is_lm_head(name, facts)}
    extras = {
        BASE_KEY: base.resolve().name if base else config.get(BASE_KEY),
        "vocab_size": vocab_size,
    }
    write_tensors(tensors, folder, {key: value for key, value in extras.items() if value is not None}, where)
    own_size = None if shared else facts.own_lm_head_size and (facts.draft_vocabulary or facts.own_lm_head_size)
    return Conversion(replace(facts, own_lm_head_size=own_size), layout, shared)


def _read(source: str | Path) -> tuple[str, Layout, dict[str, Tensor]]:
    """Return the file that was read, its layout, and the weights by the Medusa authors' names."""
    path = pickle_file(source)
    if path is None:
        stored = find_heads(source)
        infer_architecture(stored.shapes, stored.where, stored.names)  # checked before any tensor is read
        return stored.where, stored.layout, read_tensors(stored)
    held = read_pickle(path)
    layout = detect_layout(held, str(path))
    mapped = canonical_names(held, layout, str(path))
    tensors = {name: held[stored_name] for name, stored_name in mapped.items() if stored_name}
    check_types(tensors, path)
    return str(path), layout, add_zero_biases(tensors, mapped)


def _check_target(source: str | Path, folder: Path, force: bool) -> None:
    place = Path(source).expanduser()
    home = place if place.is_dir() else place.parent
    if place.exists() and folder.resolve() == home.resolve():
        raise HeadsError(f"{folder}: the heads to convert are in this folder; give another folder to write to")
    check_output_folder(folder, CONVERTED)
    taken = [name for name in (WEIGHTS_NAME, CONFIG_NAME) if (folder / name).exists()]
    if taken and not force:
        raise HeadsError(f"{folder}: has {' and '.join(taken)} already; give another folder, or --force to overwrite")


def _base_sizes(base: Path) -> tuple[int, int]:
    """Return hidden size and vocabulary size of the model in a folder."""
    config = read_heads_config(base)
    hidden_size, vocab_size = config.get("hidden_size"), config.get("vocab_size")
    if not (isinstance(hidden_size, int) and isinstance(vocab_size, int)):
        raise HeadsError(f"{base}: no hidden_size and vocab_size in its {CONFIG_NAME}; give the folder of a decoder")
    return hidden_size, vocab_size


def _vocab_size(facts: HeadArchitecture, config: dict[str, Any]) -> int | None:
    """Return the vocabulary size by the heads' own lm_heads or else by config.json; `None` if neither has it."""
    if facts.own_lm_head_size and facts.own_lm_head_size != facts.draft_vocabulary:
        return facts.own_lm_head_size
    stated = config.get("vocab_size")
    return stated if isinstance(stated, int) and stated > 0 else None


def _is_lm_head(name: str, facts: HeadArchitecture) -> bool:
    return name.endswith(f".{facts.layers}.weight")


def _is_the_models(tensors: dict[str, Tensor], facts: HeadArchitecture, base: Path) -> bool:
    """Return whether the lm_heads of all heads equal the model's lm_head, value for value."""
    if not facts.own_lm_head_size:
        return False
    entries = {entry.name: entry for file in sorted(base.glob("*.safetensors")) for entry in read_header(file)}
    held = next((entries[name] for name in LM_HEADS if name in entries), None)
    if held is None:
        return False
    rows = read_weights({"lm_head": held})["lm_head"].float()
    rows = rows[tensors[MAP_NAME]] if MAP_NAME in tensors else rows
    owned = [tensors[f"{head}.{facts.layers}.weight"].float() for head in range(facts.heads)]
    return all(torch.equal(one[: len(rows)], rows[: len(one)]) for one in owned)  # the padding may differ
