"""Whether a model fits a device, known before anything is loaded."""

from __future__ import annotations

from medusa_runtime.backends.device import Device
from medusa_runtime.errors import CapacityError
from medusa_runtime.facts import ModelFacts


def check_device_memory(
    device: Device, name: str, model: ModelFacts, itemsize: int, weights: int, workspace: int
) -> None:
    """Raise CapacityError where weights, KV rows and workspace (all in bytes) do not fit, before anything is loaded."""
    rows = model.context
    cache = rows * model.kv_bytes_per_token(itemsize)
    needed, free = weights + cache + workspace, device.free_bytes()
    if needed > free:
        raise CapacityError(
            f"{name} needs about {needed / 1e9:.1f} GB: weights {weights / 1e9:.1f}, keys and values of {rows} tokens "
            f"{cache / 1e9:.1f}, workspace {workspace / 1e9:.1f}; {free / 1e9:.1f} GB are free. Close what else uses "
            "the GPU, take a precision of fewer bits, or give a smaller max_length"
        )
