"""Mutated files of heads: each is refused with a typed error, or its tensors are those that safetensors reads."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutations import apply

HIDDEN, VOCABULARY = 8, 11


@dataclass(frozen=True)
class Context:
    """The folders of heads, one a layout, and what is in their files."""

    state: Path
    layouts: dict[str, dict[str, bytes]]


def prepare(state: Path) -> Context:
    """Read the pristine folders below `state`."""
    warnings.simplefilter("ignore")
    layouts = {
        folder.name: {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        for folder in sorted((state / "layouts").iterdir())
    }
    return Context(state, layouts)


def run(context: Context, case: dict[str, Any]) -> dict[str, Any]:
    """Write a mutated copy of one layout and load it."""
    from medusa_exporter.heads.errors import HeadsError
    from medusa_exporter.heads.storage import load_heads
    from medusa_runtime.errors import MedusaError

    files = dict(context.layouts[case["layout"]])
    for name, mutation in case["mutations"]:
        if name in files:
            files[name] = apply(mutation, files[name], name, files)
    folder = context.state / "work"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    scratch = Path(os.environ["TMPDIR"])
    try:
        heads = load_heads(folder, HIDDEN, VOCABULARY)
    except (HeadsError, MedusaError) as error:
        found = {"outcome": "refused", "layer": "heads", "detail": f"{type(error).__name__}: {error}"[:300]}
    else:
        found = _compared(heads, folder)
    left = {path.name for path in folder.iterdir()} - files.keys() | {path.name for path in scratch.iterdir()}
    return {"outcome": "litter", "detail": str(sorted(left)[:3])} if left else found


def _compared(heads: Any, folder: Path) -> dict[str, Any]:
    """Whether every number of the heads is finite and stands in the files."""
    import safetensors
    import safetensors.torch
    import torch

    stored: list[Any] = []
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(safetensors.SafetensorError):  # a shard without heads, which nobody reads
            stored += safetensors.torch.load(file.read_bytes()).values()
    known = set(torch.cat([one.float().flatten() for one in stored]).tolist()) | {0.0}
    for name, tensor in heads.named_parameters():
        if not torch.isfinite(tensor).all():
            return {"outcome": "not finite", "detail": name}
        if not known.issuperset(tensor.flatten().tolist()):
            return {"outcome": "other numbers", "detail": name}
    return {"outcome": "loaded", "layer": "answer", "detail": ""}
