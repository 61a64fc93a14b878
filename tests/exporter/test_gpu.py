"""The commands on a GPU, compared with the CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from medusa_exporter import families
from medusa_exporter.build import build

from .bench.in_process import prompts_file, run
from .family_models import save_family

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("profile", ["tree-4", "tree-64"])
def test_every_tensor_is_the_cpus(tiny_backends: Path, precision: str, profile: str) -> None:
    both = f"ort-cpu:fp32,ort-cuda:{precision}"
    assert run("compare", tiny_backends, "--backends", both, "--profile", profile, "--steps", 4) == 0


FAMILIES = {  # a window that most steps reach beyond; biases; a norm of each head, of a size that rope stays outside of
    "mistral": {"sliding_window": 20},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 24, "num_key_value_heads": 4},
    **{family: {} for family in families.FAMILIES.keys() - {"llama", "mistral", "qwen2", "qwen3"}},
}
WINDOWS = ("mistral", "gemma2")  # where a causal graph would need a mask


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tensor_of_other_families(tiny_model: Path, tiny_heads: Path, tmp_path: Path, family: str) -> None:
    model, bundle = save_family(family, tiny_model, tmp_path / "model", **FAMILIES[family]), tmp_path / "bundle"
    kinds = {"backends": ("ort-cpu", "ort-cuda"), "precisions": ("fp32", "fp16", "bf16"), "profiles": ("tree-8",)}
    build(str(model), str(tiny_heads), bundle, **kinds)
    assert (bundle / "graphs" / "ort-cuda-fp16-causal.onnx").exists() is (family not in WINDOWS)
    for precision in ("fp32", "fp16", "bf16"):
        assert run("compare", bundle, "--backends", f"ort-cpu:fp32,ort-cuda:{precision}", "--steps", 3) == 0


def test_backends_take_turns(tiny_backends: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    options = ["--backends", "ort-cpu,ort-cuda", "--precision", "fp32", "--profile", "tree-8", "--max-new-tokens", 40]
    assert run("bench", tiny_backends, "--prompts", prompts_file(tmp_path), *options, "--json", output) == 0
    content = json.loads(output.read_text())
    cuda = content["backends"]["ort-cuda"]
    assert re.fullmatch(r"\d+\.\d", cuda["capability"]) and cuda["driver"] and cuda["memory_bytes_per_second"] > 1e11
    ours = [result for result in content["results"] if result["backend"] == "ort-cuda"]
    assert [result["profile"] for result in ours] == ["plain", "tree-8"]
    assert all(
        result["same_as_first_backend"]["identical"] == result["same_as_first_backend"]["answers"] > 0
        for result in ours
    )
