"""Keeps ONNX Runtime from using AMX, the matrix instructions of newer Xeons, where the user asks for it.

ONNX Runtime's matrix multiplications of 8-bit integers use AMX where the processor has it, for every number of rows.
AMX works on tiles of 16 rows, so a step of one row may take longer than with AVX-512 VNNI: measure it on your machine.
ONNX Runtime has no option for this. It asks Linux for the permission to use AMX once in a process, in its first
session; Linux refuses it while a thread has a signal stack that is too small for AMX's registers (kernel documentation,
arch/x86/xstate, "Dynamic features and signal frames"), and then ONNX Runtime uses VNNI.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from medusa_runtime.errors import ArgumentError

VARIABLE = "MEDUSA_AMX"
STACK_BYTES = 8192  # enough for the registers without AMX's, which take another 8 KiB
DISABLED = 2  # SS_DISABLE


class _SignalStack(ctypes.Structure):
    """C's `stack_t`."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def is_refused(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the user wants no AMX, on a system where that can be had."""
    return environment.get(VARIABLE) == "0" and sys.platform.startswith("linux") and platform.machine() == "x86_64"


def has_amx(file: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the processor has AMX for 8-bit integers, as Linux reports it; False on other systems."""
    try:
        return "amx_int8" in file.read_text(encoding="utf-8").split()
    except OSError:
        return False


@contextmanager
def permitted_amx(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Let the process's first session of ONNX Runtime be created inside; with MEDUSA_AMX=0 it gets no AMX.

    The permission is the process's: the variable changes nothing if something else has asked for it before, and other
    libraries can ask for it afterwards. On other systems and processors nothing happens.

    Raises:
        ArgumentError: The variable is neither 0 nor 1.
    """
    wanted = environment.get(VARIABLE, "1")
    if wanted not in ("0", "1"):
        raise ArgumentError(f"{VARIABLE} is {wanted!r:.40}, expected 0 (without AMX) or 1; set it to one of these")
    if not is_refused(environment):
        yield
        return
    library, before = ctypes.CDLL(None), _SignalStack()
    memory = ctypes.create_string_buffer(STACK_BYTES)
    small = _SignalStack(ctypes.addressof(memory), 0, STACK_BYTES)
    library.sigaltstack(ctypes.byref(small), ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)
