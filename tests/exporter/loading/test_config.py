"""What config.json and the files next to it say is refused by name, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.build import build
from medusa_exporter.loading.config import MAX_JSON_BYTES
from medusa_exporter.models import ModelSource, check_family, load_model
from medusa_runtime.errors import UnsupportedModelError

from .conftest import Folder

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
METHODS = [
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes"),
    ({"quantization_config": FP8}, "fp8"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ({"quantization_config": {"quant_method": "quark"}}, "quark"),
    ({"quantization_config": {"quant_method": "of tomorrow"}}, "of tomorrow"),
    ({"quantization_config": {"bits": 4}}, "an unnamed method"),
    ({"quantization_config": "int8"}, "'int8'"),
    ({"text_config": {"quantization_config": FP8}}, "fp8"),
    ({"thinker_config": {"text_config": {"quantization_config": FP8}}}, "fp8"),
    ({"compression_config": {"quant_method": "sparseml"}}, "sparseml"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
]


@pytest.mark.parametrize(("config", "method"), METHODS)
def test_quantised_checkpoints_are_refused_by_name(tmp_path: Path, config: dict[str, Any], method: str) -> None:
    """The folder holds nothing but a config: nothing else can have been read."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    source = ModelSource.resolve(str(tmp_path))
    for check in (lambda: check_family(source), lambda: load_model(source, None)):  # type: ignore[arg-type]
        with pytest.raises(UnsupportedModelError, match=f"its weights are quantised by {method} .*expected weights in"):
            check()


@pytest.mark.parametrize(
    ("name", "method"),
    [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"), ("hf_quant_config.json", "ModelOpt")],
)
def test_files_of_older_tools_are_known(folder: Folder, name: str, method: str) -> None:
    (folder.path / name).write_text("{}")
    with pytest.raises(UnsupportedModelError, match=rf"quantised by {method} \({name}\)"):
        check_family(ModelSource.resolve(str(folder)))


@pytest.mark.parametrize("value", ["null", "{}"])
def test_a_key_that_describes_nothing_is_none(folder: Folder, value: str) -> None:
    path = folder.path / "config.json"
    path.write_text(path.read_text().replace("{", f'{{"quantization_config": {value},', 1))
    assert check_family(ModelSource.resolve(str(folder))) == "llama"


def test_an_adapter_next_to_the_weights_is_not_left_out(folder: Folder, tiny_heads: Path, tmp_path: Path) -> None:
    (folder.path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"holds an adapter .*merge the adapter"):
        build(str(folder), str(tiny_heads), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "holds list, expected a JSON object"),
        (b'"llama"', "holds str, expected a JSON object"),
        (b"null", "holds NoneType, expected a JSON object"),
        (b"\xff{}", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b" " * (MAX_JSON_BYTES + 1), "bytes, expected at most"),
        (b"{}", "model type None is not supported"),
        (b'{"model_type": ["llama"]}', "is not supported"),
    ],
)
def test_what_is_no_config_is_told(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=words):
        check_family(ModelSource.resolve(str(tmp_path)))


def test_a_text_model_within_another_is_named(tmp_path: Path) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedModelError, match=r"'llava' \(around a text model of type 'llama'\) is not supported"
    ):
        check_family(ModelSource.resolve(str(tmp_path)))


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaBidirectionalModel", "MyLlamaForCausalLM"])
def test_another_architecture_of_the_same_type_is_refused(folder: Folder, name: str) -> None:
    folder.config(architectures=[name])
    with pytest.raises(UnsupportedModelError, match=f"architecture is {name}, expected LlamaForCausalLM"):
        load_model(ModelSource.resolve(str(folder)), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_attention_that_looks_ahead_is_refused(folder: Folder, change: dict[str, Any]) -> None:
    folder.config(**change)
    with pytest.raises(UnsupportedModelError, match="its attention looks ahead"):
        load_model(ModelSource.resolve(str(folder)), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [None, ["LLaMAForCausalLM"], ["MedusaLlamaForCausalLM"]])
def test_older_spellings_and_models_with_heads_pass(folder: Folder, names: list[str] | None) -> None:
    import torch

    folder.config(architectures=names)
    load_model(ModelSource.resolve(str(folder)), torch.float32)
