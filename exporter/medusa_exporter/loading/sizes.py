"""How large a decoder is, by its config alone: no weight is read, and none is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medusa_exporter.extras import import_extra


@dataclass(frozen=True)
class DecoderSizes:
    """What a config says. parameters: how many numbers the weights hold, tied ones counted once.

    largest: of these, how many the largest weight holds.
    """

    hidden_size: int
    vocab_size: int
    layers: int
    parameters: int
    largest: int


def read_sizes(config: Mapping[str, Any]) -> DecoderSizes:
    """Read the sizes off the content of a config.json of a served family; what it leaves out is the family's default.

    Raises whatever transformers raises for a config that describes no decoder.
    """
    torch, transformers = import_extra("torch", "export"), import_extra("transformers", "export")
    whole = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        decoder = transformers.AutoModelForCausalLM.from_config(whole, trust_remote_code=False)
    weights = [weight.numel() for weight in decoder.parameters()]
    rows, hidden_size = decoder.get_output_embeddings().weight.shape
    return DecoderSizes(hidden_size, rows, whole.num_hidden_layers, sum(weights), max(weights))
