"""A step's outputs as the tensors that are compared: named, grouped, each on a scale of its own."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray, StepOutputs

GROUPS = {contract.LOGITS: "logits", contract.HIDDEN: "hidden", "tap": "taps", "new_key": "keys", "new_value": "values"}
_NUMBERED = re.compile(r"(.+)_(\d+)")


class Tensor(NamedTuple):
    """What a name stands for. layer: of a key, a value or a tap."""

    group: str
    layer: int | None


def float_tensors(outputs: StepOutputs, hidden_size: int, taps: tuple[int, ...]) -> dict[str, FloatArray]:
    """Return all outputs but ids, `hidden` cut into what comes after the final norm and what each tap reads.

    They come in the order of layers, so that the first which is wrong is where that begins.
    A tapped layer's input has a few elements a thousand times as large: beside them no error of the rest would show.
    """
    found = {name: array for name, array in outputs.items() if name not in (contract.TOKENS, contract.ARGMAX)}
    hidden = found.pop(contract.HIDDEN)
    for part, name in enumerate((contract.HIDDEN, *(f"tap_{layer}" for layer in taps))):
        found[name] = hidden[..., part * hidden_size : (part + 1) * hidden_size]
    ordered = sorted(found, key=_layer)
    return {name: np.ascontiguousarray(found[name], np.float32) for name in ordered}  # as polygraphy wants them


def parse_name(name: str) -> Tensor:
    """Return what a name of `float_tensors` stands for."""
    numbered = _NUMBERED.fullmatch(name)
    return Tensor(GROUPS[numbered[1]], int(numbered[2])) if numbered else Tensor(GROUPS[name], None)


def _layer(name: str) -> float:
    layer = parse_name(name).layer
    return math.inf if layer is None else layer
