"""Polygraphy's comparison of two sets of arrays, silenced."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
from medusa_runtime.backends.base import FloatArray
from medusa_runtime.errors import MedusaError, MissingExtraError

SIDES = ("other", "reference")  # what polygraphy calls the two


class ArrayResult(NamedTuple):
    """error: the largest, as a share of the largest magnitude in the reference; passed: polygraphy's verdict."""

    error: float
    passed: bool


def load_polygraphy() -> tuple[Any, Any]:
    """Return its comparator and its logger. Raises MissingExtraError with the pip command."""
    try:
        from polygraphy import comparator
        from polygraphy.logger import G_LOGGER
    except ImportError as error:  # `export` brings much that a machine for TensorRT alone need not have
        raise MissingExtraError(
            f"polygraphy is not installed ({error}); it comes with: pip install 'medusa-export[export]', or "
            "alone: pip install polygraphy"
        ) from error
    return comparator, G_LOGGER


def compare_arrays(
    reference: dict[str, FloatArray], other: dict[str, FloatArray], tolerance: float
) -> dict[str, ArrayResult]:
    """Compare each array of `reference` with the other's of the same name.

    tolerance: the largest absolute error of any element, as a share of the array's largest magnitude. What is not
    finite fails. Raises MedusaError where names or shapes differ.
    """
    shapes, others = ({name: array.shape for name, array in side.items()} for side in (reference, other))
    if shapes != others:
        name = next(name for name in shapes | others if shapes.get(name) != others.get(name))
        raise MedusaError(f"{name} has the shape {others.get(name)}, expected {shapes.get(name)}: not the same step")
    comparator, logger = load_polygraphy()
    with logger.verbosity(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, about what is not finite
        scales = {name: float(np.abs(array).max()) for name, array in reference.items()}
        sides = (
            comparator.IterationResult(arrays, runner_name=side)
            for side, arrays in zip(SIDES, (other, reference), strict=True)
        )
        compare = comparator.CompareFunc.simple(
            rtol=0,
            atol={name: tolerance * scale for name, scale in scales.items()},
            check_error_stat="max",
            find_output_func=lambda name, _index, _outputs: [name],  # its own also takes names that are alike
        )
        results = compare(*sides)
    return {
        name: ArrayResult(_share(float(result.max_absdiff), scales[name]), bool(result) and math.isfinite(scales[name]))
        for name, result in results.items()
    }


def _share(error: float, scale: float) -> float:
    if scale:
        return error / scale
    return math.inf if error else 0.0
