"""Creates the peers' models from the weights of the bundle's model, and keeps them in a cache folder.

peers.py runs this in a separate process, so that torch's memory is freed before anything is measured. It reads a job
from standard input, {"model", "cache", "python", "models": names of RECIPES}, and writes a JSON object with the path of
each model. The weights of the file may be 4-bit already: every model is made from the decoded values, as ours are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LLAMA_QUANTISE = """
import ctypes, sys
import llama_cpp
source, target, kind = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, "LLAMA_FTYPE_" + kind)
parameters.allow_requantize = True
parameters.pure = True  # otherwise some tensors keep more bits
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))
"""
LLAMA_FILE = "model.gguf"
OPTIMUM = "from optimum.commands.optimum_cli import main; main()"  # optimum-cli, whatever its script is called
GENAI, LLAMA, OPTIMUM_INTEL = "onnxruntime-genai", "llama-cpp-python", "optimum-intel"


@dataclass(frozen=True)
class Recipe:
    """How a peer's own tool makes one model: the package that has the tool, and the tool's arguments."""

    package: str
    arguments: tuple[str, ...] = ()


def _genai(precision: str, *options: str) -> Recipe:
    return Recipe(GENAI, ("-p", precision, *(["--extra_options", *options] if options else [])))


def _openvino(weights: str, *options: str) -> Recipe:
    return Recipe(OPTIMUM_INTEL, ("--weight-format", weights, *options))


LAST_LOGITS = "prune_lm_head=true"  # faster prefill; speculation needs the logits of all tokens
OWN_FILE = "llama.cpp own file"  # the file that the bundle was built from, as it is
RECIPES = {
    "genai fp32": _genai("fp32", LAST_LOGITS),
    "genai fp32 all logits": _genai("fp32"),
    **{f"genai {p} b{b}": _genai(p, f"block_size={b}", LAST_LOGITS) for p in ("int8", "int4") for b in (32, 64)},
    **{f"genai {p} b{b} all logits": _genai(p, f"block_size={b}") for p in ("int8", "int4") for b in (32, 64)},
    "llama.cpp F32": Recipe(LLAMA, ("ALL_F32",)),
    **{f"llama.cpp {kind}": Recipe(LLAMA, (f"MOSTLY_{kind}",)) for kind in ("F16", "Q8_0", "Q4_0")},
    "OpenVINO fp32": _openvino("fp32"),
    "OpenVINO int8": _openvino("int8"),
    "OpenVINO int4": _openvino("int4", "--sym", "--group-size", "32", "--ratio", "1.0", "--all-layers"),
}


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


def create(name: str, model: str, folder: Path, python: str) -> Path:
    """Create the model of one of RECIPES in `folder`, unless it exists, and return its path."""
    if name == OWN_FILE:
        return Path(model).resolve()
    recipe = RECIPES[name]
    place = folder / f"{name}-{_version(python, recipe.package)}-{_digest(recipe.arguments)}".replace(" ", "-")
    is_llama = recipe.package == LLAMA
    weights = Path(model) if is_llama else weights_folder(model, folder)
    _cached(place, lambda target: _run(name, [python, *COMMANDS[recipe.package](weights, target), *recipe.arguments]))
    return place / LLAMA_FILE if is_llama else place


def _genai_command(weights: Path, target: Path) -> list[str]:
    return ["-m", "onnxruntime_genai.models.builder", "-m", str(weights), "-o", str(target), "-e", "cpu"]


def _openvino_command(weights: Path, target: Path) -> list[str]:
    export = ["-c", OPTIMUM, "export", "openvino", "--task", "text-generation-with-past"]
    return [*export, "-m", str(weights), str(target)]


def _llama_command(weights: Path, target: Path) -> list[str]:
    return ["-c", LLAMA_QUANTISE, str(weights), str(target / LLAMA_FILE)]


COMMANDS = {GENAI: _genai_command, OPTIMUM_INTEL: _openvino_command, LLAMA: _llama_command}


def _run(name: str, command: list[str]) -> None:
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    offline.pop("PYTHONPATH", None)  # the peers' environment has its own packages
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=offline)
    if done.returncode:
        raise SystemExit(f"{name} could not be created:\n{done.stderr[-3000:] or done.stdout[-3000:]}")


def _digest(arguments: tuple[str, ...]) -> str:
    return hashlib.sha256(repr(arguments).encode()).hexdigest()[:6]


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
    made = {name: str(create(name, job["model"], folder, job["python"])) for name in job["models"]}
    print(json.dumps(made))


if __name__ == "__main__":
    main()
