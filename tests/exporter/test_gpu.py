"""What the commands do on a GPU, beside the CPU."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from medusa_exporter.build import build
from transformers import AutoConfig, AutoModelForCausalLM

from .bench.here import prompts_file, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("profile", ["tree-4", "tree-64"])
def test_every_tensor_is_the_cpus(tiny_backends: Path, precision: str, profile: str) -> None:
    both = f"ort-cpu:fp32,ort-cuda:{precision}"
    assert run("compare", tiny_backends, "--backends", both, "--profile", profile, "--steps", 4) == 0


FAMILIES = {  # a window that most steps reach beyond; biases; a norm of each head, of a size that rope stays outside of
    "mistral": {"sliding_window": 20, "num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 24, "num_key_value_heads": 4},
}


def bundle_of(family: str, like: Path, heads: Path, folder: Path) -> Path:
    """A bundle of a random model of another family, of the sizes of `like`, with its tokenizer and its heads."""
    given = json.loads((like / "config.json").read_text())
    torch.manual_seed(7)
    config = AutoConfig.for_model(
        family,
        **{name: given[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        **{name: given[name] for name in ("num_attention_heads", "max_position_embeddings", "eos_token_id")},
        **FAMILIES[family],
    )
    shutil.copytree(like, folder / "model")
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from initialisation, so that norms and biases matter
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(folder / "model")
    kinds = {"backends": ("ort-cpu", "ort-cuda"), "precisions": ("fp32", "fp16", "bf16"), "profiles": ("tree-8",)}
    build(str(folder / "model"), str(heads), folder / "bundle", **kinds)
    return folder / "bundle"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_other_families(tiny_model: Path, tiny_heads: Path, tmp_path: Path, family: str) -> None:
    bundle = bundle_of(family, tiny_model, tiny_heads, tmp_path)
    assert (bundle / "graphs" / "ort-cuda-fp16-causal.onnx").exists() is (family != "mistral")
    for precision in ("fp32", "fp16", "bf16"):
        assert run("compare", bundle, "--backends", f"ort-cpu:fp32,ort-cuda:{precision}", "--steps", 3) == 0


def test_backends_take_turns(tiny_backends: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    options = ["--backends", "ort-cpu,ort-cuda", "--precision", "fp32", "--profile", "tree-8", "--max-new-tokens", 40]
    assert run("bench", tiny_backends, "--prompts", prompts_file(tmp_path), *options, "--json", output) == 0
    content = json.loads(output.read_text())
    cuda = content["backends"]["ort-cuda"]
    assert re.fullmatch(r"\d+\.\d", cuda["capability"]) and cuda["driver"] and cuda["bandwidth"] > 1e11
    ours = [result for result in content["results"] if result["backend"] == "ort-cuda"]
    assert [result["profile"] for result in ours] == ["plain", "tree-8"]
    assert all(result["same_as_first"]["equal"] == result["same_as_first"]["answers"] > 0 for result in ours)
