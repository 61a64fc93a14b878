"""Checks that a model's files contain exactly the weights of its decoder, before and after loading them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_runtime.errors import UnsupportedModelError

from medusa_exporter.extras import import_extra
from medusa_exporter.loading.config import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = ("BF16", "F16", "F32", "F64")  # dtypes as safetensors names them
SHOWN = 5  # names in a message
HEADS = re.compile(r"medusa_heads?\.")  # tensors of Medusa heads in the same file, which are loaded separately

REMEDY = "fetch the model again, or use one whose config.json belongs to its weights"


def check_files(folder: Path, explicit: str | None = None) -> None:
    """Check the headers of the files that transformers would read, before any weight is read.

    Args:
        folder: The model's folder.
        explicit: File that config.json names in `transformers_weights`, if it does.

    Raises:
        UnsupportedModelError: There are no weights; a shard of the index is missing; a file is truncated or damaged, or
            is a pickle of anything but tensors; a tensor exists twice or is missing from the shard that the index
            names; or weights are stored as integers or in 8 bits.
    """
    name = explicit or next((name for name in NAMES if (folder / name).is_file()), None)
    if name is None or not _inside(folder, name).is_file():
        raise UnsupportedModelError(
            f"{folder}: {'no weights' if name is None else f'no {name}, which its config.json names'} in it; expected "
            "model.safetensors, or model.safetensors.index.json and its shards; fetch the model again"
        )
    if not name.endswith(".index.json"):
        _check_shards(folder, [name], None)
        return
    places = read_object(folder / name).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise UnsupportedModelError(
            f"{folder / name}: no weight_map from tensors to files in it; expected one; fetch the model again"
        )
    shards = sorted(set(places.values()))
    if missing := [shard for shard in shards if not _inside(folder, shard).is_file()]:
        raise UnsupportedModelError(
            f"{folder}: {name} names {_listed(missing)}, which {'is' if len(missing) == 1 else 'are'} not there; "
            "expected every shard; fetch the model again"
        )
    _check_shards(folder, shards, places)


def check_loaded(model: PreTrainedModel, info: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedModelError unless every weight came from the files and every tensor of the files is used.

    A model with tied embeddings needs no separate lm_head, and tensors of Medusa heads are ignored. Tensors that
    transformers itself ignores (such as rotary frequencies) are not in its loading info.

    Args:
        model: The loaded model.
        info: transformers' loading info: `missing_keys`, `unexpected_keys` and `mismatched_keys` (name, shape in the
            file, shape in the model).
        where: Name of the model in messages.
    """
    missing = info["missing_keys"]
    unexpected = [name for name in info["unexpected_keys"] if not HEADS.match(name)]
    mismatched = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]}
    faults = []
    if missing:
        faults.append(f"{len(missing)} weights of the model are not in its files ({_listed(missing)})")
    if mismatched:
        name = _ordered(mismatched)[0]
        faults.append(
            f"{len(mismatched)} have another shape ({_listed(mismatched)}; {name} is {mismatched[name][0]} in the file "
            f"and {mismatched[name][1]} by config.json)"
        )
    if unexpected:
        faults.append(f"{len(unexpected)} tensors of its files are none of the model's ({_listed(unexpected)})")
    if faults:
        raise UnsupportedModelError(
            f"{where}: {'; '.join(faults)}; expected every weight of {type(model).__name__}, each once: {REMEDY}"
        )
    _check_tied(model, where)


def _check_tied(model: PreTrainedModel, where: str) -> None:
    """Reject a separate lm_head if the config ties it to the embedding: loaders disagree which one applies."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or head is None:
        return
    if head.weight.data_ptr() != embedding.weight.data_ptr():
        raise UnsupportedModelError(
            f"{where}: its files hold an lm_head that differs from the embedding, while config.json ties the two "
            "(tie_word_embeddings); expected one or the other: set tie_word_embeddings to false in config.json to use "
            "the lm_head, or remove it from the files"
        )


def _check_shards(folder: Path, shards: Iterable[str], places: Mapping[str, str] | None) -> None:
    held: dict[str, str] = {}
    for shard in shards:
        read = _header if shard.endswith(".safetensors") else _pickled_header
        for name, kind in read(folder / shard).items():
            if name in held:
                raise UnsupportedModelError(
                    f"{folder}: {held[name]} and {shard} both hold {name!r}; expected each tensor once: fetch the "
                    "model again"
                )
            held[name] = shard
            if name.endswith(".weight") and kind not in FLOATS:
                raise UnsupportedModelError(
                    f"{folder / shard}: {name} is stored as {kind}, expected one of {', '.join(FLOATS)}; give a model "
                    "whose weights are not quantised"
                )
    if places is not None and (wrong := [name for name, shard in places.items() if held.get(name) != shard]):
        raise UnsupportedModelError(
            f"{folder}: its index names {_listed(wrong)}, which {'is' if len(wrong) == 1 else 'are'} not in the shard "
            "named; expected every tensor in its shard; fetch the model again"
        )


def _header(path: Path) -> dict[str, str]:
    """Return the dtype of each tensor of a safetensors file; raise UnsupportedModelError if it is damaged."""
    safetensors = import_extra("safetensors", "export")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 -- no mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise UnsupportedModelError(
            f"{path}: truncated or damaged ({error}); expected a whole safetensors file: fetch it again"
        ) from error


def _pickled_header(path: Path) -> dict[str, str]:
    """Return the dtype of each tensor of a `torch.save` file, without running code or reading values."""
    import torch

    try:
        held = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # a malicious or damaged file can raise any error
        reason = " ".join(str(error).strip().splitlines()[:1])
        raise UnsupportedModelError(
            f"{path}: truncated, damaged or not a pickle of tensors alone ({type(error).__name__}: {reason}); expected "
            "a state dict that torch.save wrote: fetch it again, or give the model as safetensors"
        ) from error
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise UnsupportedModelError(
            f"{path}: holds other things than tensors under names; expected a state dict that torch.save wrote: give "
            "the model as safetensors"
        )
    kinds = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
    return {str(name): kinds.get(value.dtype, str(value.dtype)) for name, value in held.items()}


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise UnsupportedModelError(
            f"{folder}: names {name!r} as a file of weights, expected a file next to config.json; fetch the model again"
        )
    return folder / name


def _ordered(names: Collection[str]) -> list[str]:
    """Sort names, with layer 2 before layer 10."""
    return sorted(
        names, key=lambda name: [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
    )


def _listed(names: Collection[str]) -> str:
    ordered = _ordered(names)
    return ", ".join(ordered[:SHOWN]) + (", …" if len(ordered) > SHOWN else "")
