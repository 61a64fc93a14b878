"""Profile the kernels of a step on a GPU: microseconds per step of each kernel, for plain decoding and for a tree.

    python benchmarks/gpu_kernels.py BUNDLE --backend ort-cuda --precision fp16 --profile tree-64 --past 200

Requires `pip install cupti-python` for the CUDA version that the backend uses. The sum is not the time of a step: it
counts every kernel and copy, whoever launched it, but not the gaps between them. `medusa-export bench` measures steps.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cupti import cupti
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends import load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder

KINDS = (cupti.ActivityKind.CONCURRENT_KERNEL, cupti.ActivityKind.MEMCPY, cupti.ActivityKind.MEMSET)
BUFFER = 8 << 20  # bytes
NUMBERED = re.compile("__myl_bb[0-9]+_[0-9]+_")  # a TensorRT prefix; the rest of the name describes the kernel
WARM = 8  # steps: the first one of a shape runs without a CUDA graph, the second captures one
NAME = 110  # characters of a kernel's name that are printed


def main() -> None:
    """Parse the command line, profile and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="Bundle folder.")
    parser.add_argument("--backend", default="ort-cuda", help="Backend to profile (default: ort-cuda).")
    parser.add_argument("--precision", default="fp16", help="Precision of the graph (default: fp16).")
    parser.add_argument("--profile", default="tree-64", help="Tree to profile (default: tree-64).")
    parser.add_argument("--past", type=int, default=200, help="Length of the random prompt, in tokens (default: 200).")
    parser.add_argument("--steps", type=int, default=16, help="Steps to average over (default: 16).")
    parser.add_argument("--top", type=int, default=30, help="Number of kernels to print (default: 30).")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    decoder = Decoder(load_backend(bundle, options.backend, options.precision))
    prompt = np.random.default_rng(0).integers(0, bundle.model.vocab_size, options.past).tolist()
    modes = {"plain": TreeProfile.plain(), options.profile: bundle.profile(options.profile)}
    spent = {name: kernels(decoder, tree, prompt, options.steps) for name, tree in modes.items()}
    print_table(spent, options.top)


def kernels(decoder: Decoder, tree: TreeProfile, prompt: list[int], steps: int) -> dict[str, tuple[float, float]]:
    """Return, by kernel, the number of launches and the microseconds per step."""
    decoder.set_profile(tree)
    decoder.start(prompt, tree.size * (WARM + steps) + 1, stop_ids=())  # the prefill adds one token
    for _ in range(WARM):
        decoder.step()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kernel, started, ended in trace_kernels(lambda: [decoder.step() for _ in range(steps)]):
        name = NUMBERED.sub("__myl_", kernel)
        found[name][0] += 1 / steps
        found[name][1] += (ended - started) / 1e3 / steps
    return {name: (count, micros) for name, (count, micros) in found.items()}


def trace_kernels(work: Callable[[], object]) -> list[tuple[str, int, int]]:
    """Return name, start and end in nanoseconds of each kernel and copy during `work`, which waits for them."""
    events: list[tuple[str, int, int]] = []

    def keep(found: list[Any]) -> None:
        for event in found:
            name = getattr(event, "name", None) or cupti.ActivityKind(event.kind).name.lower()
            if 0 < event.start <= event.end:  # CUPTI reports 0 for unknown times
                events.append((name, event.start, event.end))

    cupti.activity_register_callbacks(lambda: (BUFFER, 0), keep)
    for kind in KINDS:
        cupti.activity_enable(kind)
    work()
    cupti.activity_flush_all(1)
    for kind in KINDS:
        cupti.activity_disable(kind)
    return sorted(events, key=lambda event: event[1])


def print_table(spent: dict[str, dict[str, tuple[float, float]]], top: int) -> None:
    """Print the kernels that take the longest in either mode, and the sum of all kernels."""
    names = sorted({name for one in spent.values() for name in one}, key=lambda name: -max(_us(spent, name)))
    print("  ".join(f"{f'{mode}, us':>14}{'count':>8}" for mode in spent) + "  kernel")
    for name in names[:top]:
        cells = (one.get(name, (0.0, 0.0)) for one in spent.values())
        print("  ".join(f"{micros:14.1f}{count:8.1f}" for count, micros in cells) + f"  {name[:NAME]}")
    sums = ([sum(column) for column in zip(*one.values(), strict=True)] for one in spent.values())
    print("  ".join(f"{micros:14.1f}{count:8.1f}" for count, micros in sums) + "  all")


def _us(spent: dict[str, dict[str, tuple[float, float]]], name: str) -> list[float]:
    return [one.get(name, (0.0, 0.0))[1] for one in spent.values()]


if __name__ == "__main__":
    main()
