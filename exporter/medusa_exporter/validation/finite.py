"""Refuses a reference with NaN or infinity in it, with which no graph could be compared."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from medusa_runtime.errors import UnsupportedModelError

from medusa_exporter.validation.steps import FloatArray, RecordedStep, Recording


def check_finite(reference: Recording, name: str) -> Recording:
    """Return the reference; raise UnsupportedModelError if the model `name` or its heads computed NaN or infinity."""
    for step in reference.steps:
        for where, rows in _parts(step):
            if not np.isfinite(rows).all():
                raise UnsupportedModelError(
                    f"{name}: the model itself computes {_kind(rows)} in {where} (a {step.name} step in fp32, before "
                    "any graph is exported), expected finite values; check its weights, or download it again"
                )
    if reference.draft is not None and not np.isfinite(reference.draft.logits).all():
        raise UnsupportedModelError(
            f"{name}: the heads compute {_kind(reference.draft.logits)} in their logits, expected finite values; check "
            "their weights, or train them again"
        )
    return reference


def _parts(step: RecordedStep) -> Iterator[tuple[str, FloatArray]]:
    """Return the parts of a step and their names, in the order in which they are computed."""
    rows = step.expected
    for layer in range(len(rows.keys)):
        yield f"the keys of layer {layer}", rows.keys[layer]
        yield f"the values of layer {layer}", rows.values[layer]
    yield "the hidden state after the last layer", rows.hidden
    yield "the logits", rows.logits


def _kind(rows: FloatArray) -> str:
    return "NaN" if np.isnan(rows).any() else "infinity"
