"""Makes the peers' models from the same weights as ours, and keeps them in a cache folder.

Run by peers.py in a process of its own, so that torch's memory is gone before anything is measured:
`python benchmarks/peers_model.py MODEL CACHE [GENAI_PYTHON]` prints the folder of onnxruntime-genai's model.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def weights_folder(model: str, cache: Path) -> Path:
    """Write MODEL as a plain Hugging Face folder in fp32, as every peer's converter reads it."""
    from medusa_exporter.models import ModelSource

    source = ModelSource.resolve(model)
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.files()]
    key = hashlib.sha256(repr((source.location, source.gguf, facts)).encode()).hexdigest()[:12]
    name = Path(source.gguf or source.location).stem

    def write(folder: Path) -> None:
        import torch
        from medusa_exporter.models import load_model, load_tokenizer

        load_model(source, torch.float32).save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)

    return _made(cache / f"{name}-{key}" / "hf-fp32", write)


def genai_folder(weights: Path, python: str) -> Path:
    """Build onnxruntime-genai's fp32 model for the CPU with the builder that its package brings."""
    builder = [python, "-m", "onnxruntime_genai.models.builder"]
    version = subprocess.run(
        [python, "-c", "from importlib.metadata import version; print(version('onnxruntime-genai'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()

    def write(folder: Path) -> None:
        arguments = ["-m", str(weights), "-o", str(folder), "-p", "fp32", "-e", "cpu"]
        done = subprocess.run([*builder, *arguments], check=False, capture_output=True, text=True)
        if done.returncode or not (folder / "genai_config.json").is_file():
            raise SystemExit(f"onnxruntime-genai's builder failed: {done.stderr[-3000:] or done.stdout[-3000:]}")

    return _made(weights.parent / f"genai-{version}-fp32", write)


def _made(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return `folder`; if it is not there, write it beside its place first, so that it is never half there."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            write(scratch)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


if __name__ == "__main__":
    MODEL, CACHE, *GENAI = sys.argv[1:]
    print(genai_folder(weights_folder(MODEL, Path(CACHE).resolve()), GENAI[0] if GENAI else sys.executable))
