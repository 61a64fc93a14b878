"""Compares two sets of named arrays with Polygraphy and returns the largest error of each array."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
from medusa_runtime.backends.base import FloatArray
from medusa_runtime.errors import MedusaError, MissingExtraError

RUNNER_NAMES = ("other", "reference")  # the names under which Polygraphy gets the two sides


class ArrayResult(NamedTuple):
    """The comparison of one array.

    Attributes:
        error: Largest absolute error, as a share of the largest magnitude in the reference's array.
        passed: Whether Polygraphy found the error to be within the tolerance.
    """

    error: float
    passed: bool


def load_polygraphy() -> tuple[Any, Any]:
    """Import Polygraphy; return its comparator and its logger.

    Raises:
        MissingExtraError: Polygraphy is not installed; the message has the pip command.
    """
    try:
        from polygraphy import comparator
        from polygraphy.logger import G_LOGGER
    except ImportError as error:  # the `export` extra also brings torch, which a TensorRT machine need not have
        raise MissingExtraError(
            f"polygraphy is not installed ({error}); install it with the exporter: pip install "
            "'medusa-export[export]', or alone: pip install polygraphy safetensors"
        ) from error
    return comparator, G_LOGGER


def compare_arrays(
    reference: dict[str, FloatArray], other: dict[str, FloatArray], tolerance: float
) -> dict[str, ArrayResult]:
    """Compare each array of `reference` with the array of the same name in `other`.

    An array with an element that is not finite fails.

    Args:
        reference: The arrays that are taken as correct, by name.
        other: The arrays to check. Names and shapes must be those of `reference`.
        tolerance: The largest absolute error that any element may have, as a share of the largest magnitude in the
            reference's array.

    Raises:
        MedusaError: Names or shapes differ.
    """
    shapes, others = ({name: array.shape for name, array in side.items()} for side in (reference, other))
    if shapes != others:
        name = next(name for name in shapes | others if shapes.get(name) != others.get(name))
        raise MedusaError(
            f"{name} has the shape {others.get(name)}, expected {shapes.get(name)}: the two sides did not run the same "
            "step; compare graphs of one model and one set of heads"
        )
    comparator, logger = load_polygraphy()
    with logger.verbosity(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns about elements that are not finite
        scales = {name: float(np.abs(array).max()) for name, array in reference.items()}
        sides = (
            comparator.IterationResult(arrays, runner_name=name)
            for name, arrays in zip(RUNNER_NAMES, (other, reference), strict=True)
        )
        compare = comparator.CompareFunc.simple(
            rtol=0,
            atol={name: tolerance * scale for name, scale in scales.items()},
            check_error_stat="max",
            find_output_func=lambda name, _index, _outputs: [name],  # the default also matches similar names
        )
        results = compare(*sides)
    return {
        name: ArrayResult(
            _relative(float(result.max_absdiff), scales[name]), bool(result) and math.isfinite(scales[name])
        )
        for name, result in results.items()
    }


def _relative(error: float, scale: float) -> float:
    if scale:
        return error / scale
    return math.inf if error else 0.0
