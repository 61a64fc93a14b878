"""Records llama.cpp's logits for the files of `gguf_models`: run it by hand where a case was added or changed.

It needs llama-cpp-python (0.3.36 was used), which the tests do not:

    pip install llama-cpp-python gguf && python tests/exporter/loading/record_gguf_logits.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from gguf_models import CASES, CONTEXT, ROWS, TEXT, write

F32 = 0  # ggml's number for fp32, here of the keys and values that are kept
LOGITS = Path(__file__).with_name("gguf_logits.npz")


def main() -> None:
    """Write every case, let llama.cpp compute its logits, store those of ROWS, (len(ROWS), vocabulary) each."""
    logits = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            model = llama_cpp.Llama(
                str(write(case, Path(folder) / f"{name}.gguf")),
                n_ctx=CONTEXT,
                n_threads=1,
                n_gpu_layers=0,
                logits_all=True,
                flash_attn=False,
                type_k=F32,
                type_v=F32,
                verbose=False,
            )
            model.eval(TEXT)
            logits[name] = np.array(model.scores[list(ROWS)], np.float32)
    np.savez_compressed(LOGITS, **logits)
    sys.stdout.write(f"{LOGITS}: {LOGITS.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
