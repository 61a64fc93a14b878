"""Reads the facts about a decoder that a bundle's manifest records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medusa_runtime.facts import ModelFacts

from medusa_exporter.models import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_facts(
    model: PreTrainedModel, source: ModelSource, eos_token_ids: tuple[int, ...], context: int
) -> ModelFacts:
    """Return the name, the shape and the end tokens of a loaded decoder.

    Args:
        model: The decoder, as `models.load_model` returns it.
        source: Where it was loaded from; names the model.
        eos_token_ids: Tokens that end an answer, see `loading.end_tokens`.
        context: Number of tokens that a prompt and its answer may have together in the bundle.
    """
    config = model.config
    heads = config.num_attention_heads
    return ModelFacts(
        name=source.name,
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        attention_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        context=context,
        eos_token_ids=eos_token_ids,
    )
