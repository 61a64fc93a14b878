"""The check that a model fits in the device's memory, made before anything is loaded."""

from __future__ import annotations

from medusa_runtime.backends.device import Device
from medusa_runtime.errors import CapacityError
from medusa_runtime.facts import ModelFacts


def check_device_memory(
    device: Device, name: str, model: ModelFacts, itemsize: int, weights: int, workspace: int
) -> None:
    """Check that weights, KV cache and workspace fit in the free memory of a device.

    Args:
        device: The device.
        name: Name of the backend, for the message.
        model: The model; its context is the number of rows of the KV cache.
        itemsize: Bytes of one element of the KV cache.
        weights: Bytes of the weights.
        workspace: Approximate number of bytes that the library needs.

    Raises:
        CapacityError: They do not fit.
    """
    rows = model.context
    cache = rows * model.kv_bytes_per_token(itemsize)
    needed, free = weights + cache + workspace, device.free_bytes()
    if needed > free:
        raise CapacityError(
            f"{name} needs about {needed / 1e9:.1f} GB: weights {weights / 1e9:.1f}, keys and values of {rows} tokens "
            f"{cache / 1e9:.1f}, workspace {workspace / 1e9:.1f}; {free / 1e9:.1f} GB are free. Close what else uses "
            "the GPU, choose a precision of fewer bits, or set a smaller max_length"
        )
