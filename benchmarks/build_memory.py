"""Measure the peak memory of `medusa-export build`, with a new process for each precision.

    python benchmarks/build_memory.py MODEL --heads HEADS [--precision fp32,int8,w8a8,int4] [--json FILE]

Two kinds of memory are reported: anonymous memory, which only the process itself can free (RssAnon in /proc/PID/status,
sampled every two milliseconds), and all resident memory including pages of mapped files (VmHWM, exact). For both, the
table has the peak, the increase, and the increase as a multiple of the fp32 weights of decoder and heads. The increase
is the peak minus the memory of a process that has imported all libraries and traced a model of two layers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from medusa_exporter.files import write_json
from medusa_exporter.overwrite_check import JsonKind, check_output_file

OUTPUT = JsonKind("benchmarks/build_memory.py", frozenset({"weights", "builds"}))
INTERVAL = 0.002  # seconds between samples
CHILD = """
import gc, json, sys
from pathlib import Path
import accelerate, gguf, onnx, onnx.checker, onnx_ir, onnxruntime, onnxscript, safetensors.torch
import onnxruntime.quantization.matmul_nbits_quantizer
import torch, transformers, torch.onnx._internal.exporter._core, torch._dynamo, torch.export
from onnxscript import optimizer
from transformers.models.llama import modeling_llama
from medusa_exporter.build import build
from medusa_exporter.model_facts import model_facts
from medusa_exporter.graph import check, variants
from medusa_exporter.graph.memory import release_memory
from medusa_exporter.graph.trace import trace
from medusa_exporter.heads.storage import load_heads
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.models import ModelSource

def report(line):
    print(line, flush=True)
    sys.stdin.readline()

def trace_tiny():
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    tiny = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).requires_grad_(False).eval()
    facts = model_facts(tiny, ModelSource("tiny"), (0,), 64)
    trace(tiny, MedusaHeads(16, 2, 1).requires_grad_(False).eval(), facts, 5)

trace_tiny()
release_memory()
report("ready")
model, heads, bundle, options = sys.argv[1:]
build(model, heads, Path(bundle), report=report, **json.loads(options))
gc.collect()
report("built")
"""


@dataclass
class Usage:
    """Bytes of one process: its anonymous and resident memory before the build, and the peaks of each stage."""

    ready_anonymous: int
    ready_resident: int
    anonymous: dict[str, int] = field(default_factory=dict)  # the peak of each stage
    at_start: dict[str, int] = field(default_factory=dict)
    resident_peak: int = 0

    @property
    def peaks(self) -> tuple[int, int]:
        """The peaks of anonymous memory and of all resident memory, which includes pages of mapped files."""
        return max(self.anonymous.values()), self.resident_peak

    @property
    def increases(self) -> tuple[int, int]:
        """The peaks minus the memory before the build."""
        return self.peaks[0] - self.ready_anonymous, self.peaks[1] - self.ready_resident


def measure(model: str, heads: str, bundle: Path, options: Mapping[str, object]) -> Usage:
    """Build `bundle` in a new process and sample its memory; RuntimeError when the build fails."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CHILD, model, heads, str(bundle), json.dumps(dict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as child,
    ):
        assert child.stdout is not None and child.stdin is not None  # noqa: S101 -- they are pipes
        watch = _MemorySampler(child.pid)
        usage = None
        for line in child.stdout:
            stage = line.strip()
            memory = read_status(child.pid)
            if stage == "ready":
                reset_peak(child.pid)
                usage = Usage(memory["RssAnon"], memory["VmRSS"])
                watch.start()
            if usage is not None:
                watch.stage(stage, memory["RssAnon"])
                usage.resident_peak = max(usage.resident_peak, memory["VmHWM"])
            child.stdin.write("\n")
            child.stdin.flush()
        code = child.wait()
        watch.stop()
        if code or usage is None:
            errors.seek(0)
            raise RuntimeError(f"the build of {model} failed ({code}): {errors.read()[-2000:]}")
    usage.anonymous, usage.at_start = watch.peaks, watch.starts
    return usage


def read_status(process: int) -> dict[str, int]:
    """Return the memory values of /proc/PID/status, in bytes."""
    text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def reset_peak(process: int) -> None:
    """Reset VmHWM of a process to its resident memory now."""
    Path(f"/proc/{process}/clear_refs").write_text("5", encoding="ascii")


class _MemorySampler:
    """Samples a process from a thread and keeps the highest anonymous memory of each stage."""

    def __init__(self, process: int) -> None:
        self._process, self._stage, self._stopped = process, "", threading.Event()
        self.peaks: dict[str, int] = {}
        self.starts: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stage(self, name: str, anonymous: int) -> None:
        self.peaks[name] = self.starts[name] = anonymous
        self._stage = name

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.ident:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            stage = self._stage
            try:
                anonymous = read_status(self._process).get("RssAnon", 0)
            except OSError:
                return
            if stage:
                self.peaks[stage] = max(self.peaks[stage], anonymous)
            time.sleep(INTERVAL)


def weights_of(model: str, heads: str) -> int:
    """Return the bytes of the decoder and its heads in fp32; tied weights are counted once."""
    import torch
    from medusa_exporter import models
    from medusa_exporter.heads.storage import load_heads

    loaded = models.load_model(models.ModelSource.resolve(model), torch.float32)
    H, V = loaded.config.hidden_size, loaded.get_output_embeddings().weight.shape[0]
    trained = load_heads(heads, H, V)
    return 4 * sum(weight.numel() for module in (loaded, trained) for weight in module.parameters())


def main() -> None:
    """Parse the command line, build once for each precision and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Model: folder, GGUF file or Hugging Face hub name.")
    parser.add_argument("--heads", required=True, help="Heads: folder or Hugging Face hub name.")
    parser.add_argument("--backend", default="ort-cpu", help="Backend to build for (default: ort-cpu).")
    parser.add_argument(
        "--precision", default="fp32,int8,w8a8,int4", help="Comma-separated list; each one is built separately."
    )
    parser.add_argument("--profile", default="tree-4", help="Tree to build with (default: tree-4).")
    parser.add_argument("--stages", action="store_true", help="Also print the peak of every stage.")
    parser.add_argument("--json", type=Path, help="File to write the results to.")
    options = parser.parse_args()
    if options.json:
        check_output_file(options.json, OUTPUT)
    weights = weights_of(options.model, options.heads)
    print(f"fp32 weights of {options.model} and its heads: {weights / 1e6:.0f} MB")
    print(
        "| precision | anonymous: peak, MB | increase, MB | x weights | resident: peak, MB | increase, MB | x weights |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    results = {}
    for precision in options.precision.split(","):
        build_options = {"backends": [options.backend], "precisions": [precision], "profiles": [options.profile]}
        with tempfile.TemporaryDirectory() as folder:
            usage = measure(options.model, options.heads, Path(folder) / "bundle", build_options)
        figures = [
            f"{peak / 1e6:.0f} | {increase / 1e6:.0f} | {increase / weights:.2f}"
            for peak, increase in zip(usage.peaks, usage.increases, strict=True)
        ]
        print(f"| {precision} | {' | '.join(figures)} |", flush=True)
        if options.stages:
            for stage, peak in usage.anonymous.items():
                start, end = (size - usage.ready_anonymous for size in (usage.at_start[stage], peak))
                print(f"    {start / 1e6:6.0f} at its start, {end / 1e6:6.0f} at its peak: {stage}")
        results[precision] = asdict(usage)
    if options.json:
        write_json(options.json, OUTPUT.marked({"weights": weights, "builds": results}))


if __name__ == "__main__":
    main()
