"""Reads pickled heads as tensors and nothing else; only `medusa-export heads convert` uses it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.layouts import INDEX_NAMES

WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_TYPES = (torch.int64,)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a state dict that `torch.save` wrote; each tensor gets its own memory.

    `torch.load(weights_only=True)` refuses everything that could run code.

    Raises:
        HeadsError: The pickle holds anything but plain tensors under names, or is damaged.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a hostile or damaged file may raise anything
        reason = " ".join(str(error).strip().splitlines()[:1])
        raise HeadsError(
            f"{path}: not a pickle of tensors alone, or damaged ({type(error).__name__}: {reason}); "
            "expected a state dict written by torch.save"
        ) from error
    if not isinstance(loaded, dict):
        raise HeadsError(f"{path}: holds {type(loaded).__name__}, expected a state dict from names to tensors")
    tensors: dict[str, Tensor] = {}
    while loaded:  # one at a time, so that each is freed as soon as it is copied
        name, value = loaded.popitem()
        _check_plain(name, value, path)
        tensors[name] = value.detach().clone()
    return tensors


def check_types(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise HeadsError unless weights are floats of 16 or 32 bits, and a token_map and taps int64."""
    for name, tensor in tensors.items():
        types = INDEX_TYPES if name in INDEX_NAMES else WEIGHT_TYPES
        if tensor.dtype not in types:
            raise HeadsError(f"{path}: {name} is stored as {tensor.dtype}; expected {' or '.join(map(str, types))}")


def _check_plain(name: object, value: object, path: Path) -> None:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise HeadsError(f"{path}: holds {type(value).__name__} under {name!r:.80}, expected tensors under names")
    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise HeadsError(f"{path}: {name} is not a plain tensor with all its values in the file; expected one")
