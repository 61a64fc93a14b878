"""Whether sums of products of bytes are exact, and what a session is told where they are not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from medusa_runtime.backends.integer_products import (
    DEPTH,
    EXACT_OPTION,
    probe_model,
    products_are_exact,
    set_exact_products,
)


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    products_are_exact.cache_clear()
    yield
    products_are_exact.cache_clear()


class Sessions:
    """onnxruntime, but for sums that are too small by `error` where there are `rows`."""

    SessionOptions = onnxruntime.SessionOptions

    def __init__(self, rows: int, error: int) -> None:
        self.rows, self.error = rows, error

    def InferenceSession(self, model: bytes, options: object, providers: list[str]) -> Sessions:
        self.session = onnxruntime.InferenceSession(model, options, providers=providers)
        return self

    def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        (sums,) = self.session.run(names, inputs)
        return [sums - self.error * (len(sums) == self.rows)]


def test_the_probe_is_a_valid_model() -> None:
    model = onnx.load_from_string(probe_model())
    onnx.checker.check_model(model, full_check=True)
    (weight,) = model.graph.initializer
    assert (onnx.numpy_helper.to_array(weight) == 127).all()
    sums = onnx.reference.ReferenceEvaluator(model).run(None, {"a": np.full((3, DEPTH), 255, np.uint8)})[0]
    assert sums.shape == (3, DEPTH) and (sums == DEPTH * 255 * 127).all()


@pytest.mark.parametrize(("rows", "error", "exact"), [(1, 0, True), (1, 1, False), (8, 1000, False), (3, 1, True)])
def test_any_wrong_sum_sets_the_option(rows: int, error: int, exact: bool) -> None:
    found, options = Sessions(rows, error), onnxruntime.SessionOptions()
    set_exact_products(found, options)
    assert products_are_exact(found) is exact
    if exact:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(EXACT_OPTION)
    else:
        assert options.get_session_config_entry(EXACT_OPTION) == "1"


def test_with_the_option_sums_are_exact_on_every_processor() -> None:
    """Full bytes of both signs; ONNX Runtime turns the signed weight into an unsigned one, but for ARM."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(EXACT_OPTION, "1")
    session = onnxruntime.InferenceSession(probe_model(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for rows in (1, 2, 5):
        a = rng.integers(0, 256, (rows, DEPTH)).astype(np.uint8)
        (sums,) = session.run(None, {"a": a})
        np.testing.assert_array_equal(sums, a.astype(np.int32) @ np.full((DEPTH, DEPTH), 127, np.int32))
