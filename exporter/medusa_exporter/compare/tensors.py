"""Splits a step's outputs into the named tensors that a comparison reports, each compared on its own scale."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray, StepOutputs

GROUP_OF_OUTPUT = {
    contract.LOGITS: "logits",
    contract.HIDDEN: "hidden",
    "tap": "taps",
    "new_key": "keys",
    "new_value": "values",
}
_WITH_LAYER = re.compile(r"(.+)_(\d+)")


class TensorName(NamedTuple):
    """The parts of a tensor's name.

    Attributes:
        group: What the tensor is, one of the values of GROUP_OF_OUTPUT.
        layer: The layer of a key, value or tap; None for other tensors.
    """

    group: str
    layer: int | None


def float_tensors(outputs: StepOutputs, hidden_size: int, taps: tuple[int, ...]) -> dict[str, FloatArray]:
    """Return the floating-point tensors of a step by name, in the order of their layers.

    The graph concatenates the hidden states behind the final norm and the tapped layers' inputs in one output,
    `hidden`. They are split here: a tapped layer's input has a few elements a thousand times as large as the others,
    and on a common scale no error in the other parts would be visible. With `hidden_size` 64 and `taps` (10, 20), the
    192 columns of `hidden` become `hidden`, `tap_10` and `tap_20` of 64 columns each.
    """
    found = {name: array for name, array in outputs.items() if name not in (contract.TOKENS, contract.ARGMAX)}
    hidden = found.pop(contract.HIDDEN)
    for part, name in enumerate((contract.HIDDEN, *(f"tap_{layer}" for layer in taps))):
        found[name] = hidden[..., part * hidden_size : (part + 1) * hidden_size]
    ordered = sorted(found, key=_layer)
    return {name: np.ascontiguousarray(found[name], np.float32) for name in ordered}  # Polygraphy needs contiguous ones


def parse_name(name: str) -> TensorName:
    """Return group and layer of a tensor name, for example ("keys", 3) for "new_key_3"."""
    match = _WITH_LAYER.fullmatch(name)
    return TensorName(GROUP_OF_OUTPUT[match[1]], int(match[2])) if match else TensorName(GROUP_OF_OUTPUT[name], None)


def _layer(name: str) -> float:
    layer = parse_name(name).layer
    return math.inf if layer is None else layer
