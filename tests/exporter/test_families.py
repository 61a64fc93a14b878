"""The table of families: what it serves is what transformers describes, and what it does not is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from medusa_exporter import families, models
from medusa_exporter.build import build
from medusa_exporter.cli import group
from medusa_exporter.families import ACTIVATIONS, FAMILIES, DecoderConfig
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.heads.storage import save_heads
from medusa_exporter.models import ModelSource, check_family, read_decoder_config
from medusa_exporter.precisions import PRECISIONS, choose_pairs, supported_precisions
from medusa_exporter.preflight import check_build
from medusa_runtime.errors import UnsupportedModelError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

OPEN_LLAMA_3B = {"hidden_size": 3200, "num_attention_heads": 32}  # heads of 100 elements


def config_of(folder: Path, content: dict[str, Any]) -> ModelSource:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return ModelSource.resolve(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_one_of_transformers_with_its_own_sizes(family: str, tmp_path: Path) -> None:
    assert family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    decoder = read_decoder_config(config_of(tmp_path, {"model_type": family}))
    assert (decoder.family, decoder.head_dim % 8, decoder.activation in ACTIVATIONS) == (family, 0, True)


@pytest.mark.parametrize(
    ("content", "head_dim", "activation"),
    [
        ({"model_type": "llama", **OPEN_LLAMA_3B}, 100, "silu"),
        ({"model_type": "llama", **OPEN_LLAMA_3B, "head_dim": 64, "hidden_act": "gelu"}, 64, "gelu"),
        ({"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16}, 128, "silu"),  # the family's own
        ({"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 4, "head_dim": None}, 16, "silu"),
    ],
    ids=str,
)
def test_what_a_config_leaves_out(content: dict[str, Any], head_dim: int, activation: str, tmp_path: Path) -> None:
    decoder = read_decoder_config(config_of(tmp_path, content))
    assert (decoder.head_dim, decoder.activation) == (head_dim, activation)


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48}
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {  # as their config.json says: heads of so many, context
    "phi-3-mini-4k": ({"model_type": "phi3", "sliding_window": 2047, "max_position_embeddings": 4096}, 96, 4096),
    "phi-4-mini": (
        {"model_type": "phi3", "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75},
        128,
        4096,
    ),
    "gemma-2-9b": (
        {
            "model_type": "gemma2",
            "hidden_size": 3584,
            "num_attention_heads": 16,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 4096,
            "max_position_embeddings": 8192,
        },
        256,
        8192,
    ),
    "gemma-2b": (
        {"model_type": "gemma", "hidden_size": 2048, "num_attention_heads": 8, "hidden_act": "gelu"},
        256,
        8192,
    ),
    "smollm3-3b": (
        {
            "model_type": "smollm3",
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "sliding_window": None,
            "max_position_embeddings": 65536,
        },
        128,
        65536,
    ),
    "pythia-160m": (
        {
            "model_type": "gpt_neox",
            "hidden_size": 768,
            "num_attention_heads": 12,
            "hidden_act": "gelu",
            "rotary_pct": 0.25,
            "max_position_embeddings": 2048,
        },
        64,
        2048,
    ),
    "command-r": ({"model_type": "cohere", "hidden_size": 8192, "num_attention_heads": 64}, 128, 8192),
    "olmo-2-7b": ({"model_type": "olmo2", "max_position_embeddings": 4096}, 128, 4096),
    "granite-3.1-2b": (
        {"model_type": "granite", "hidden_size": 2048, "num_attention_heads": 32, "max_position_embeddings": 131072},
        64,
        131072,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_served_everywhere(name: str, tmp_path: Path) -> None:
    content, head_dim, context = PUBLISHED[name]
    source = config_of(tmp_path, content)
    decoder = read_decoder_config(source)
    assert decoder.head_dim == head_dim
    assert models.choose_context(source, None) == context
    assert all(supported_precisions(decoder, backend) == kinds for backend, kinds in PRECISIONS.items())


def test_phi3s_longrope_is_served_up_to_where_it_changes(tmp_path: Path) -> None:
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    source = config_of(tmp_path, {"model_type": "phi3", "rope_scaling": LONGROPE, **lengths})
    assert (read_decoder_config(source).head_dim, models.choose_context(source, 4096)) == (96, 4096)
    with pytest.raises(UnsupportedModelError, match="longrope uses other frequencies beyond 4096"):
        models.choose_context(source, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"hidden_act": "mish"},
            "activation 'mish' is not supported; expected one of silu, .*use a model with another",
        ),
        ({"head_dim": -8}, "heads of -8 elements, expected a whole number above 0"),
        ({"num_attention_heads": 0}, "describes no Llama|heads of"),
        ({"hidden_size": "wide"}, "describes no Llama .*expected the sizes of a model"),
    ],
    ids=str,
)
def test_a_config_that_no_graph_is_made_of(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        check_family(config_of(tmp_path, {"model_type": "llama"} | content))


@pytest.mark.parametrize("backend", PRECISIONS)
def test_heads_of_100_elements_are_built_where_attention_is_spelt_out(backend: str) -> None:
    decoder = DecoderConfig("llama", 100, "silu")
    expected = {"ort-cpu": (), "ort-cuda": ("fp32",)}.get(backend, PRECISIONS[backend])
    assert supported_precisions(decoder, backend) == expected
    for precision in PRECISIONS[backend]:
        if precision in expected:
            assert choose_pairs([backend], [precision], decoder) == [(backend, precision)]
            continue
        message = (
            f"Llama is not built for {backend} in {precision}: its heads have 100 elements, .* multiples of 8; "
            "expected one of: ort-cuda in fp32; tensorrt in fp16, bf16, fp32; tensorrt-rtx in fp16, bf16, fp32"
        )
        with pytest.raises(UnsupportedModelError, match=message):
            choose_pairs([backend], [precision], decoder)


def test_what_the_table_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {("ort-cpu", "w8a8"): "its norms were not measured"}
    table = {**FAMILIES, "llama": replace(FAMILIES["llama"], refused=refused)}
    monkeypatch.setattr(families, "FAMILIES", table)
    decoder = DecoderConfig("llama", 64, "silu")
    assert supported_precisions(decoder, "ort-cpu") == ("fp32", "int8", "int4")
    message = (
        "Llama is not built for ort-cpu in w8a8: its norms were not measured; expected one of: ort-cpu in fp32, int8"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        choose_pairs(["ort-cpu"], ["fp32", "w8a8"], decoder)


def test_a_build_is_refused_before_weights_are_read(
    tmp_path: Path, tiny_heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_of(tmp_path / "model", {"model_type": "llama", **OPEN_LLAMA_3B})
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UnsupportedModelError, match="heads have 100 elements"):
        build(str(tmp_path / "model"), str(tiny_heads), tmp_path / "bundle", backends=("ort-cpu", "ort-cuda"))
    assert not (tmp_path / "bundle").exists()


def test_heads_with_taps_are_refused_where_layers_have_no_norm_to_see(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    for name, taps in (("tapping", (1,)), ("plain", ())):
        save_heads(MedusaHeads(64, 2, 1, "root", taps=taps), tmp_path / name, {"vocab_size": 300})
    for family in ("olmo2", "cohere"):
        source = config_of(tmp_path / family, {"model_type": family, "vocab_size": 300, **sizes})
        check_build(source, str(tmp_path / "plain"), print)
        if family == "cohere":
            check_build(source, str(tmp_path / "tapping"), print)
            continue
        with pytest.raises(HeadsError, match="tapping: heads with taps, but the layers of OLMo 2 read their input"):
            check_build(source, str(tmp_path / "tapping"), print)


def test_readme_and_documentation_have_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert families.support_table(PRECISIONS) in readme
    details = (Path(__file__).parents[2] / "docs/reference/models.md").read_text(encoding="utf-8")
    assert families.differences_table() in details
    refused = {("ort-cuda", kind): "no reason" for kind in PRECISIONS["ort-cuda"]} | {("ort-cpu", "w8a8"): "none"}
    monkeypatch.setattr(families, "FAMILIES", {"llama": replace(FAMILIES["llama"], refused=refused)})
    assert (
        families.support_table(PRECISIONS).splitlines()[-1] == "| Llama | run; w8a8 refused | refused | run | built |"
    )


@pytest.mark.parametrize("command", ["build", "distill"])
def test_a_family_that_is_not_served_ends_every_command_at_once(command: str, tmp_path: Path, tiny_heads: Path) -> None:
    """Before its tokenizer and weights, neither of which is there."""
    model = config_of(tmp_path / "model", {"model_type": "bloom"}).location
    options = {
        "build": ["--heads", str(tiny_heads), "-o", str(tmp_path / "bundle")],
        "distill": ["--synthesize", "4", "-o", str(tmp_path / "data")],
    }
    result = CliRunner().invoke(group, [command, model, *options[command]])
    assert isinstance(result.exception, UnsupportedModelError)
    assert f"model type 'bloom' is not supported; expected one of {', '.join(FAMILIES)}" in str(result.exception)
