"""Stores hidden states during training: on the device, else in host memory, else in a temporary file."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import torch
from medusa_runtime.errors import CapacityError
from torch import Tensor

SHARE = 0.8  # of the free memory; training needs the rest


def allocate_states(
    count: int, width: int, dtype: torch.dtype, device: torch.device, disk: Path | None = None, extra: int = 0
) -> Tensor:
    """Allocate an uninitialised tensor (count, width) in the first place that it fits: device, host memory or file.

    Args:
        count: Number of positions.
        width: Values per position.
        dtype: Type of the values.
        device: The model's device.
        disk: Folder for a temporary file, `None` if none is to be used.
        extra: Further bytes per position that are needed on the device, wherever the states are.

    Raises:
        CapacityError: It fits nowhere.
    """
    needed = count * width * dtype.itemsize
    free = {device: free_bytes(device)} | ({} if device.type == "cpu" else {torch.device("cpu"): free_bytes()})
    for place, bytes_free in free.items():
        more = count * extra if place == device else 0
        if bytes_free is None or needed + more <= SHARE * bytes_free:
            return torch.empty(count, width, dtype=dtype, device=place)
    has = ", ".join(f"{place} has {amount / 1e9:.1f} GB free" for place, amount in free.items() if amount is not None)
    if disk is None:
        raise CapacityError(
            f"the hidden states of {count:,} positions take {needed / 1e9:.1f} GB and may take {SHARE:.0%} of what is "
            f"free, but {has}; give less data, or a folder for a temporary file with --disk"
        )
    disk.mkdir(parents=True, exist_ok=True)
    on_disk = shutil.disk_usage(disk).free
    if needed > SHARE * on_disk:
        raise CapacityError(
            f"the hidden states of {count:,} positions take {needed / 1e9:.1f} GB, but {has} and {disk} "
            f"{on_disk / 1e9:.1f} GB; give less data or a larger disk"
        )
    return _mapped(count * width, dtype, disk).reshape(count, width)


def gather_rows(states: Tensor, chosen: Tensor) -> Tensor:
    """Return states[chosen] on the device of `chosen`, wherever the states are stored: (n,) int64 -> (n, width)."""
    if states.device == chosen.device:
        return states[chosen]
    return states[chosen.to(states.device)].to(chosen.device)


def free_bytes(device: torch.device | None = None) -> int | None:
    """Return the free bytes of a GPU or of host memory; `None` if the system does not report them."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _mapped(size: int, dtype: torch.dtype, disk: Path) -> Tensor:
    """Return a tensor whose memory is an unlinked file, which is freed when the process ends."""
    with tempfile.NamedTemporaryFile(dir=disk, prefix="hidden-states-", delete=False) as file:
        file.truncate(size * dtype.itemsize)
    try:
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype)
    finally:
        with contextlib.suppress(OSError):
            Path(file.name).unlink()
