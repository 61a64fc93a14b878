"""Checks a model's config.json for what cannot be exported: quantised weights, adapters, other architectures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa_runtime.errors import UnsupportedModelError

MAX_JSON_BYTES = 64 * 2**20  # bytes
QUANTISED = (  # keys of a config.json that describe quantised weights
    "quantization_config",  # AWQ, GPTQ, bitsandbytes, FP8, compressed-tensors, mxfp4, quark, ...
    "compression_config",  # compressed-tensors before transformers knew it
    "quantization",  # MLX
)
QUANTISED_FILES = {  # files next to config.json that older tools write instead of such a key
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
ADAPTER = "adapter_config.json"


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most 64 MiB; raise UnsupportedModelError for any other content."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UnsupportedModelError(
                f"{path}: {size} bytes, expected at most {MAX_JSON_BYTES}; fetch the model's file again"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(
            f"{path}: not valid JSON ({error}); expected a JSON object: fetch the file again"
        ) from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(
            f"{path}: holds {type(content).__name__}, expected a JSON object; fetch the file again"
        )
    return content


def check_plain_weights(config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedModelError if a checkpoint's weights are quantised.

    Args:
        config: Content of config.json; nested configs (`text_config` and others) are checked too. A key with null or
            an empty object is ignored.
        where: Name of the model in the message.
    """
    for key in QUANTISED:
        if found := config.get(key):
            raise UnsupportedModelError(_quantised(where, _method(found, key), key))
    for name, nested in config.items():
        if isinstance(nested, Mapping) and name.endswith("_config"):
            check_plain_weights(nested, where)


def check_folder(folder: Path) -> None:
    """Raise UnsupportedModelError if a folder holds quantised weights, or an adapter next to the weights."""
    for name, method in QUANTISED_FILES.items():
        if (folder / name).is_file():
            raise UnsupportedModelError(_quantised(str(folder), method, name))
    if (folder / ADAPTER).is_file():
        raise UnsupportedModelError(
            f"{folder}: holds an adapter ({ADAPTER}), whose weights would not be part of the bundle; expected a whole "
            "model: merge the adapter into it first (PEFT's merge_and_unload), or remove the adapter's files"
        )


def check_architecture(config: Mapping[str, Any], expected: str, where: str) -> None:
    """Raise UnsupportedModelError if config.json names another architecture than the causal decoder.

    Architectures with "medusa" in their name pass: they are decoders with Medusa heads among their weights.

    Args:
        config: Content of config.json.
        expected: Name of transformers' class for the causal decoder of this model type.
        where: Name of the model in the message.
    """
    if config.get("is_causal") is False or config.get("use_bidirectional_attention"):
        raise UnsupportedModelError(
            f"{where}: its attention looks ahead (is_causal, use_bidirectional_attention), expected a causal decoder; "
            "give a model that writes text"
        )
    named = config.get("architectures")
    if not named:
        return
    names = [str(name) for name in named] if isinstance(named, list) else [str(named)]
    if any(name.lower() == expected.lower() or "medusa" in name.lower() for name in names):
        return
    raise UnsupportedModelError(
        f"{where}: its architecture is {', '.join(names)}, expected {expected}; give a causal decoder, or correct "
        "'architectures' in config.json if these are its weights"
    )


def named_model_type(config: Mapping[str, Any]) -> str:
    """Return the model type for messages, including that of a nested text model."""
    text = config.get("text_config")
    nested = text.get("model_type") if isinstance(text, Mapping) else None
    outer = repr(config.get("model_type"))
    return outer if nested is None else f"{outer} (around a text model of type {nested!r})"


def _method(found: Any, key: str) -> str:
    if not isinstance(found, Mapping):
        return repr(found)[:60]
    if method := found.get("quant_method") or found.get("quant_algo"):
        return str(method)
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    if key == "quantization":
        return "MLX" if "group_size" in found else str(found.get("quant_algo", "an unnamed method"))
    return "an unnamed method"


def _quantised(where: str, method: str, source: str) -> str:
    return (
        f"{where}: its weights are quantised by {method} ({source}), expected weights in 16 or 32 bits; use the "
        "model that was quantised, and choose the bundle's precision with --precision"
    )
