"""Sizes of a decoder by its config: those of the decoder itself, found without its weights."""

import json
import time

import pytest
from medusa_exporter import models
from medusa_exporter.loading.sizes import compute_sizes
from medusa_exporter.models import ModelSource
from medusa_runtime.errors import UnsupportedModelError

from .gguf_models import CASES, write


def test_the_sizes_are_those_of_the_loaded_model(model_folder, model):
    sizes = models.read_sizes(ModelSource.resolve(str(model_folder)))
    weights = [weight.numel() for weight in model.parameters()]
    assert (sizes.parameters, sizes.largest) == (sum(weights), max(weights))
    assert (sizes.hidden_size, sizes.vocab_size, sizes.layers) == (64, 256, 2)


def test_a_gguf_file_has_sizes_too(tmp_path):
    import torch

    source = ModelSource.resolve(str(write(CASES["llama-factors"], tmp_path / "tiny.gguf")))
    loaded = models.load_model(source, torch.float32)
    assert models.read_sizes(source).parameters == sum(weight.numel() for weight in loaded.parameters())


def test_what_a_config_leaves_out_is_the_familys_default():
    assert compute_sizes({"model_type": "llama"}).parameters == 6_738_415_616  # Llama 7B


def test_a_large_model_takes_no_time_and_no_memory():
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 29_568,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152_064,
    }
    began = time.monotonic()
    sizes = compute_sizes(config)
    assert (sizes.parameters, sizes.largest) == (72_706_203_648, 152_064 * 8192)
    assert time.monotonic() - began < 10


def test_a_config_that_describes_nothing_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    with pytest.raises(UnsupportedModelError, match="its config cannot be read"):
        models.read_sizes(ModelSource.resolve(str(tmp_path)))
