"""A data set's digest tells its decoder from every other, a fine-tune that leaves the embedding included."""

import copy
import hashlib
import json

import pytest
import torch
from medusa_exporter.distillation.dataset import DataError, DataFacts, from_rows
from medusa_exporter.training import model_digest
from medusa_exporter.training.hidden_states import check_model


def tuned(model, name):
    """The model with one value of one weight moved by a little."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(name).view(-1)[-1].add_(0.5)
    return other


def earlier(model):
    """What version 0.1.0 wrote: sizes and the first 16 embedding rows."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    facts = json.dumps({name: getattr(model.config, name, None) for name in names}, sort_keys=True)
    rows = model.get_input_embeddings().weight[:16].detach().to(torch.bfloat16).view(torch.int16).numpy()
    return hashlib.sha256(facts.encode() + rows.tobytes()).hexdigest()


def test_it_is_the_same_in_half_precision_and_another_for_another_model(model, other_model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert model_digest.model_digest(half) == model_digest.model_digest(model) != model_digest.model_digest(other_model)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_fine_tune_that_leaves_the_first_rows_of_the_embedding_is_another_model(model, name):
    other = tuned(model, name)
    assert earlier(other) == earlier(model)
    assert model_digest.model_digest(other) != model_digest.model_digest(model)
    data = from_rows(DataFacts("tiny", model_digest.model_digest(model), 256, (1,), 0, {}), [])
    check_model(data, model, "tiny")
    with pytest.raises(DataError, match="sizes or weights differ from those of tuned"):
        check_model(data, other, "tuned")


def test_other_rules_of_a_layer_are_another_model(model):
    other = copy.deepcopy(model)
    other.config.rms_norm_eps = 1e-3
    assert model_digest.model_digest(other) != model_digest.model_digest(model)
    other = copy.deepcopy(model)
    other.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert model_digest.model_digest(other) != model_digest.model_digest(model)


def test_data_of_an_earlier_version_serves_the_model_it_was_made_with(model, other_model):
    data = from_rows(DataFacts("tiny", earlier(model), 256, (1,), 0, {}), [])
    assert not model_digest.covers_all_weights(data.facts.digest)
    assert model_digest.covers_all_weights(model_digest.model_digest(model))
    check_model(data, model, "tiny")
    with pytest.raises(DataError, match="sizes or weights differ"):
        check_model(data, other_model, "other")
