"""A step's outputs are split into named tensors, in the order of layers."""

from __future__ import annotations

import numpy as np
from medusa_exporter.compare.tensors import float_tensors, parse_name


def test_a_hidden_state_is_split_and_tensors_come_layer_by_layer() -> None:
    one = np.zeros((1, 2, 3), np.float32)
    hidden = np.arange(2 * 9, dtype=np.float32).reshape(1, 2, 9)
    names = [f"new_{kind}_{layer}" for kind in ("key", "value") for layer in range(11)]
    outputs = {"tokens": one, "argmax": one, "logits": one, "hidden": hidden, **dict.fromkeys(names, one)}
    found = float_tensors(outputs, 3, taps=(10, 2))
    assert set(found) == {"logits", "hidden", "tap_2", "tap_10", *names}
    assert list(found)[:2] == ["new_key_0", "new_value_0"]
    assert list(found)[-2:] == ["logits", "hidden"]
    assert list(found).index("new_key_2") < list(found).index("new_key_10")
    np.testing.assert_array_equal(found["hidden"], hidden[..., :3])
    np.testing.assert_array_equal(found["tap_10"], hidden[..., 3:6])
    np.testing.assert_array_equal(found["tap_2"], hidden[..., 6:])
    assert all(array.flags.c_contiguous for array in found.values())


def test_a_name_has_group_and_layer() -> None:
    assert [parse_name(name) for name in ("logits", "hidden", "tap_20", "new_key_3", "new_value_12")] == [
        ("logits", None),
        ("hidden", None),
        ("taps", 20),
        ("keys", 3),
        ("values", 12),
    ]
