"""Whether ONNX Runtime gets AMX, which Linux itself reports for the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from medusa_runtime.backends import load_backend
from medusa_runtime.backends.amx import VARIABLE, has_amx, permitted_amx
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import ArgumentError

SCRIPT = """
import ctypes, os, sys
from medusa_runtime import Bundle, Decoder, load_backend

def permitted():
    mask = ctypes.c_uint64()
    ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask))
    return bool(mask.value >> 18 & 1)

class Stack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

decoder = Decoder(load_backend(Bundle.open(sys.argv[1]), "ort-cpu", "w8a8", 1))
tokens = decoder.start([5, 9, 17], 12, stop_ids=())
while decoder.sequence.finish_reason is None:
    tokens += decoder.step()
found = Stack()
ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
print(permitted(), found.size if found.flags != 2 else 0, *tokens)
"""


def answer(bundle: Path, **environment: str) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, str(bundle)]
    path = {"PYTHONPATH": ":".join(sys.path), "LD_LIBRARY_PATH": "", **environment}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=path).stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such permission")
def test_amx_is_used_unless_it_is_not_wanted(tiny_precisions: Path) -> None:
    """The same tokens with and without it, and the thread's signal stack as before."""
    has_amx = "amx_int8" in Path("/proc/cpuinfo").read_text()
    permitted, stack, *tokens = answer(tiny_precisions)
    assert permitted == str(has_amx) and stack == "0"
    assert answer(tiny_precisions, MEDUSA_AMX="0") == ["False", "0", *tokens]
    assert answer(tiny_precisions, MEDUSA_AMX="1") == [permitted, "0", *tokens]


def test_the_variable_is_0_or_1() -> None:
    with pytest.raises(ArgumentError, match="MEDUSA_AMX is 'no', expected 0"), permitted_amx({VARIABLE: "no"}):
        pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such permission")
def test_a_processor_without_amx_is_another_device(tiny_precisions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it has a calibration of its own."""
    backend = load_backend(Bundle.open(tiny_precisions), "ort-cpu", "w8a8", 1)
    monkeypatch.setattr("medusa_runtime.backends.ort_cpu.has_amx", lambda: True)
    before = backend.facts().device
    monkeypatch.setenv(VARIABLE, "0")
    assert before == f"{backend.facts().device}, AMX"


def test_linux_reports_amx(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("flags\t: fpu amx_bf16 amx_int8 amx_tile\n")
    assert has_amx(file)
    file.write_text("flags\t: fpu avx512_vnni\n")
    assert not has_amx(file)
    assert not has_amx(tmp_path / "nothing")
