"""Bundles of every family: loaded whole, built for every backend and precision, and decoding the model's own tokens."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch
from medusa_exporter.build import build
from medusa_exporter.engines.add import add_engines
from medusa_exporter.families import FAMILIES
from medusa_exporter.models import ModelSource, load_model
from medusa_exporter.precisions import FORMATS, ON_GPU
from transformers import AutoModelForCausalLM

from .bench.in_process import run
from .family_models import save_family
from .graph.conftest import NEWER

IDS = torch.arange(3, 35).reshape(2, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_loaded_as_transformers_loads_it(family: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = save_family(family, tiny_model, tmp_path / "model")
    loaded = load_model(ModelSource.resolve(str(folder)), torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, expected(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", NEWER)
def test_a_bundle_of_everything_decodes_the_models_tokens(
    family: str, tiny_model: Path, tiny_heads: Path, tmp_path: Path
) -> None:
    folder = save_family(family, tiny_model, tmp_path / "model")
    kinds = {"backends": ("ort-cpu", "ort-cuda", "tensorrt"), "precisions": (*FORMATS, *ON_GPU)}
    build(str(folder), str(tiny_heads), tmp_path / "bundle", profiles=("tree-8",), **kinds)
    options = ["--precision", "fp32", "--profile", "tree-8", "--limit", 2, "--max-new-tokens", 32]
    assert run("verify", tmp_path / "bundle", "--model", folder, *options) == 0


@pytest.mark.slow
@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="TensorRT-RTX is there for Linux on x86-64 alone"
)
@pytest.mark.parametrize("family", NEWER)
def test_engines_are_built_ahead_of_time(family: str, tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    folder, bundle = save_family(family, tiny_model, tmp_path / "model"), tmp_path / "bundle"
    kinds = {"backends": ("tensorrt-rtx",), "precisions": ("fp16",), "profiles": ("tree-8",)}
    build(str(folder), str(tiny_heads), bundle, **kinds)
    assert add_engines(bundle, "tensorrt-rtx", targets=["sm86"], max_length=384, steps=["plain", "t8"])
