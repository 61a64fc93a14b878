"""What GGUF's keys come to: every one with an effect is in the config or in a refusal, before weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.loading.gguf_metadata import ARCHITECTURES, read_gguf_facts
from medusa_exporter.models import ModelSource, check_family
from medusa_runtime.errors import UnsupportedModelError

from .gguf_models import CASES, Case, with_keys, write


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_family_is_the_architecture(architecture: str, tmp_path: Path) -> None:
    path = write(CASES[architecture], tmp_path / "tiny.gguf")
    assert check_family(ModelSource.resolve(str(path))) == architecture


def test_a_file_named_mistral_is_read_as_what_it_is(tmp_path: Path) -> None:
    path = write(with_keys(CASES["llama"], general__name="mistral"), tmp_path / "tiny.gguf")
    config = read_gguf_facts(path).config
    assert config["model_type"] == "llama"
    assert "sliding_window" not in config


REFUSED: dict[str, Any] = {
    "rope.scaling.type": "longrope",
    "rope.scaling.attn_factor": 1.5,
    "rope.scaling.yarn_ext_factor": 0.5,
    "rope.scaling.yarn_attn_factor": 0.5,
    "rope.scaling.yarn_beta_fast": 16.0,
    "rope.scaling.yarn_beta_slow": 2.0,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.scaling.alpha": 1000.0,
    "rope.scaling.factor": float("nan"),
    "rope.dimension_count": 8,
    "rope.dimension_sections": [2, 3, 3],
    "rope.freq_base_swa": 10000.0,
    "attention.key_length": 0,
    "attention.value_length": 8,
    "attention.sliding_window": 16,
    "attention.sliding_window_pattern": [True, False],
    "attention.scale": 0.5,
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attention.head_count_kv": [2, 1],
    "attention.temperature_scale": 0.1,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.25,
    "embedding_scale": 12.0,
    "residual_scale": 0.22,
    "expert_count": 8,
    "expert_used_count": 2,
    "feed_forward_length": [96, 64],
    "block_count": "two",
    "hidden_activation": "gelu",
    "nextn_predict_layers": 1,
    "vocab_size": 97,
    "something_of_tomorrow": 1,
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_changes_the_numbers_is_named(key: str, tmp_path: Path) -> None:
    path = write(with_keys(CASES["llama"], **{key: REFUSED[key]}), tmp_path / "tiny.gguf")
    with pytest.raises(UnsupportedModelError, match=rf"tiny\.gguf: llama\.{key} is .*expected .*; .* instead"):
        check_family(ModelSource.resolve(str(path)))


HARMLESS: dict[str, Any] = {
    "rope.scaling.finetuned": True,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.factor": 0.0,
    "rope.dimension_count": 16,
    "attention.key_length": 16,
    "attention.sliding_window": 4096,
    "attention.scale": 0.25,
    "attention.head_count_kv": [2, 2],
    "expert_count": 0,
    "vocab_size": 98,
    "tensor_data_layout": "Meta AI original pth",
}


@pytest.mark.parametrize("key", HARMLESS)
def test_a_key_that_changes_nothing_is_accepted(key: str, tmp_path: Path) -> None:
    plain = read_gguf_facts(write(CASES["llama"], tmp_path / "plain.gguf")).config
    changed = write(with_keys(CASES["llama"], **{key: HARMLESS[key]}), tmp_path / "tiny.gguf")
    assert read_gguf_facts(changed).config == plain


@pytest.mark.parametrize("key", ["embedding_length", "context_length", "attention.layer_norm_rms_epsilon"])
def test_a_key_that_is_missing_is_named(key: str, tmp_path: Path) -> None:
    path = write(with_keys(CASES["llama"], **{key: None}), tmp_path / "tiny.gguf")
    with pytest.raises(UnsupportedModelError, match=f"without the key llama.{key}, expected"):
        read_gguf_facts(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.type": "adapter"}, "holds a 'adapter', expected a whole model"),
        ({"split.count": 3}, "one of 3 parts, expected one file; join them"),
    ],
)
def test_a_file_that_is_no_whole_model(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(with_keys(CASES["llama"], **keys), tmp_path / "tiny.gguf")
    with pytest.raises(UnsupportedModelError, match=message):
        read_gguf_facts(path)


def test_an_architecture_that_is_not_served_is_named(tmp_path: Path) -> None:
    path = write(Case("falcon"), tmp_path / "tiny.gguf")
    with pytest.raises(
        UnsupportedModelError, match="architecture 'falcon' is not supported; expected one of llama, qwen2"
    ):
        read_gguf_facts(path)
