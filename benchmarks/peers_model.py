"""Creates the peers' models from the weights of the bundle's model, and keeps them in a cache folder.

peers.py runs this in a separate process, so that torch's memory is freed before anything is measured. It reads a job
from standard input, {"model", "cache", "python", "genai": precisions, "llama": types}, and writes a JSON object with
the path of each model ("genai int8", "llama.cpp Q8_0").
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Blocks and accuracy level as in our own graphs; llama.cpp's types have blocks of 32 too.
GENAI_OPTIONS = ["--extra_options", "block_size=32", "accuracy_level=4"]
# The weights of the file may be 4-bit already: all types are made from the decoded values, as ours are.
LLAMA_QUANTISE = """
import ctypes, sys
import llama_cpp
source, target, kind = sys.argv[1:]
kinds = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, "LLAMA_FTYPE_" + kinds[kind])
parameters.allow_requantize = True
parameters.pure = True  # otherwise some tensors keep more bits
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))
"""


def model_folder(model: str, cache: Path) -> Path:
    """Return the folder of the peers' models of `model`."""
    from medusa_exporter.models import ModelSource

    source = ModelSource.resolve(model)
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.files()]
    key = hashlib.sha256(repr((source.location, source.gguf, facts)).encode()).hexdigest()[:12]
    return cache / f"{Path(source.gguf or source.location).stem}-{key}"


def weights_folder(model: str, folder: Path) -> Path:
    """Write `model` as a Hugging Face folder in fp32, which the peers' converters can read."""

    def write(target: Path) -> None:
        import torch
        from medusa_exporter.models import ModelSource, load_model, load_tokenizer

        source = ModelSource.resolve(model)
        load_model(source, torch.float32).save_pretrained(target)
        load_tokenizer(source).save_pretrained(target)

    return _cached(folder / "hf-fp32", write)


def genai_folder(weights: Path, python: str, precision: str) -> Path:
    """Build onnxruntime-genai's model for the CPU with the builder from its package."""
    builder = [python, "-m", "onnxruntime_genai.models.builder"]

    def write(folder: Path) -> None:
        arguments = ["-m", str(weights), "-o", str(folder), "-p", precision, "-e", "cpu"]
        options = [] if precision == "fp32" else GENAI_OPTIONS
        done = subprocess.run([*builder, *arguments, *options], check=False, capture_output=True, text=True)
        if done.returncode or not (folder / "genai_config.json").is_file():
            raise SystemExit(f"onnxruntime-genai's builder failed: {done.stderr[-3000:] or done.stdout[-3000:]}")

    return _cached(weights.parent / f"genai-{_version(python, 'onnxruntime-genai')}-{precision}", write)


def llama_file(model: str, folder: Path, python: str, kind: str) -> Path:
    """Create llama.cpp's model of one type from the .gguf file, with llama.cpp's own quantiser."""

    def write(target: Path) -> None:
        command = [python, "-c", LLAMA_QUANTISE, model, str(target / "model.gguf"), kind]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"llama.cpp could not create {kind} from {model}: {done.stderr[-3000:]}")

    return _cached(folder / f"llama-{_version(python, 'llama-cpp-python')}-{kind}", write) / "model.gguf"


def _version(python: str, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python, "-c", code], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{package} is not installed for {python}: {python} -m pip install {package}")
    return done.stdout.strip()


def _cached(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return `folder`; if it does not exist, write a temporary folder and rename it, so that it is never incomplete."""
    if not folder.is_dir():
        print(f"create {folder}", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            write(scratch)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def main() -> None:
    """Create the models of the job on standard input."""
    job = json.load(sys.stdin)
    folder = model_folder(job["model"], Path(job["cache"]).resolve())
    made = {}
    for precision in job["genai"]:
        weights = weights_folder(job["model"], folder)
        made[f"genai {precision}"] = str(genai_folder(weights, job["python"], precision))
    for kind in job["llama"]:
        made[f"llama.cpp {kind}"] = str(llama_file(job["model"], folder, job["python"], kind))
    print(json.dumps(made))


if __name__ == "__main__":
    main()
