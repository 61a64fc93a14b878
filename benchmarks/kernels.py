"""Where a step's time goes on a GPU: each kernel's microseconds a step, plain decoding and a tree beside each other.

    python benchmarks/kernels.py BUNDLE --backend ort-cuda --precision fp16 --profile tree-64 --past 200

Kernels are counted by torch's profiler (CUPTI), whoever launched them, so this is no measurement of a whole step: gaps
between kernels are left out, copies that wait for the host are in. `medusa-export bench` measures steps.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends import load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from torch.profiler import ProfilerActivity, profile

WARM = 8  # steps: the first of a shape is a plain one, the second is captured
NAME = 110  # characters of a kernel's name


def main() -> None:
    """Read the command line, profile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="ort-cuda")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--profile", default="tree-64")
    parser.add_argument("--past", type=int, default=200, help="tokens of the prompt, random ones")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--top", type=int, default=30, help="kernels to print")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    decoder = Decoder(load_backend(bundle, options.backend, options.precision))
    prompt = np.random.default_rng(0).integers(0, bundle.model.vocab_size, options.past).tolist()
    modes = {"plain": TreeProfile.plain(), options.profile: bundle.profile(options.profile)}
    spent = {name: kernels(decoder, tree, prompt, options.steps) for name, tree in modes.items()}
    print_table(spent, options.top)


def kernels(decoder: Decoder, tree: TreeProfile, prompt: list[int], steps: int) -> dict[str, tuple[float, float]]:
    """Return by name how often a kernel runs in a step and how many microseconds it takes there in all."""
    decoder.use(tree)
    decoder.start(prompt, tree.size * (WARM + steps) + 1, stop_ids=())  # the prompt gives one
    for _ in range(WARM):
        decoder.step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            decoder.step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA":
            found[event.name][0] += 1 / steps
            found[event.name][1] += event.device_time / steps
    return {name: (count, micros) for name, (count, micros) in found.items()}


def print_table(spent: dict[str, dict[str, tuple[float, float]]], top: int) -> None:
    """Print the kernels that take most in either, and all together."""
    names = sorted({name for one in spent.values() for name in one}, key=lambda name: -max(_us(spent, name)))
    print("  ".join(f"{f'{mode}, us':>14}{'times':>8}" for mode in spent) + "  kernel")
    for name in names[:top]:
        cells = (one.get(name, (0.0, 0.0)) for one in spent.values())
        print("  ".join(f"{micros:14.1f}{count:8.1f}" for count, micros in cells) + f"  {name[:NAME]}")
    sums = ([sum(column) for column in zip(*one.values(), strict=True)] for one in spent.values())
    print("  ".join(f"{micros:14.1f}{count:8.1f}" for count, micros in sums) + "  all")


def _us(spent: dict[str, dict[str, tuple[float, float]]], name: str) -> list[float]:
    return [one.get(name, (0.0, 0.0))[1] for one in spent.values()]


if __name__ == "__main__":
    main()
