"""Taps: decoder layers whose normalised input the heads see in addition to the last hidden state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from medusa_exporter.heads.errors import HeadsError

if TYPE_CHECKING:
    from torch import Tensor


def check_taps(taps: tuple[int, ...], layers: int, whose: str) -> None:
    """Raise HeadsError for a tap outside the decoder's `layers`; the message begins with `whose` taps they are."""
    if wrong := [layer for layer in taps if not 0 <= layer < layers]:
        raise HeadsError(
            f"{whose}: no decoder layer {wrong[0]} to tap, the model's are 0 to {layers - 1}; "
            "tap one of these, or give heads made for this model"
        )


@contextmanager
def capture_taps(model: Any, taps: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Capture the normalised inputs of the decoder's layers `taps`, (B, T, H) each, while the block runs.

    Raises:
        HeadsError: The decoder has no such layer, or no norm before its attention.
    """
    layers: Any = model.base_model.layers
    check_taps(taps, len(layers), "heads")
    if taps and not hasattr(layers[taps[0]], "input_layernorm"):
        raise HeadsError(
            f"heads with taps, but the layers of {type(model).__name__} read their input without a norm; "
            "train or give heads without taps for this model"
        )
    caught: dict[int, Tensor] = {}

    def catch(layer: int) -> Callable[[Any, Any, Tensor], None]:
        return lambda _module, _arguments, output: caught.__setitem__(layer, output)

    hooks = [layers[layer].input_layernorm.register_forward_hook(catch(layer)) for layer in taps]
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()
