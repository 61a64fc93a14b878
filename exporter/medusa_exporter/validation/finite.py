"""Refuses a reference that is not a number everywhere: there is nothing then that a graph could be compared with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from medusa_runtime.errors import UnsupportedModelError

from medusa_exporter.validation.steps import FloatArray, Reference, ReferenceStep


def check_finite(reference: Reference, name: str) -> Reference:
    """Return the reference; raise UnsupportedModelError where the model `name` or its heads gave NaN or infinity."""
    for step in reference.steps:
        for where, rows in _parts(step):
            if not np.isfinite(rows).all():
                raise UnsupportedModelError(
                    f"{name}: the model itself gives {_words(rows)} in {where} (of a {step.name} step in fp32, before "
                    "any graph is made), expected finite numbers; look at its weights, or take another copy of it"
                )
    if not np.isfinite(reference.draft.logits).all():
        raise UnsupportedModelError(
            f"{name}: its heads themselves give {_words(reference.draft.logits)} in their logits, expected finite "
            "numbers; look at their weights, or train them again"
        )
    return reference


def _parts(step: ReferenceStep) -> Iterator[tuple[str, FloatArray]]:
    """In the order in which they are computed."""
    rows = step.expected
    for layer in range(len(rows.keys)):
        yield f"the keys of layer {layer}", rows.keys[layer]
        yield f"the values of layer {layer}", rows.values[layer]
    yield "the hidden state behind the last layer", rows.hidden
    yield "the logits", rows.logits


def _words(rows: FloatArray) -> str:
    return "NaN" if np.isnan(rows).any() else "infinity"
