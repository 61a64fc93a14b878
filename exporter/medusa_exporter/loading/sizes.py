"""Determines the size of a decoder from its config alone, without reading or allocating weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medusa_exporter.extras import import_extra


@dataclass(frozen=True)
class DecoderSizes:
    """Sizes of a decoder.

    Attributes:
        hidden_size: Elements of a hidden state.
        vocab_size: Rows of the lm_head.
        layers: Number of decoder layers.
        parameters: Elements of all weights; tied weights are counted once.
        largest: Elements of the largest weight.
    """

    hidden_size: int
    vocab_size: int
    layers: int
    parameters: int
    largest: int


def compute_sizes(config: Mapping[str, Any]) -> DecoderSizes:
    """Compute the sizes from the content of a config.json; missing keys take the defaults of the model family.

    Raises whatever transformers raises for a config that describes no decoder.
    """
    torch, transformers = import_extra("torch", "export"), import_extra("transformers", "export")
    whole = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        decoder = transformers.AutoModelForCausalLM.from_config(whole, trust_remote_code=False)
    weights = [weight.numel() for weight in decoder.parameters()]
    rows, hidden_size = decoder.get_output_embeddings().weight.shape
    return DecoderSizes(hidden_size, rows, whole.num_hidden_layers, sum(weights), max(weights))
