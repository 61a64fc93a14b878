"""Reads the properties of a decoder that decide which graphs can be exported, from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medusa_runtime.errors import MedusaError, UnsupportedModelError

from medusa_exporter.extras import import_extra
from medusa_exporter.families import ACTIVATIONS, FAMILIES, DecoderConfig

# keys that config.json may leave out; transformers then derives them or uses the family's default
SHAPE = ("hidden_size", "num_attention_heads", "head_dim", "hidden_act", "hidden_activation")


def parse_decoder_config(config: Mapping[str, Any], where: str) -> DecoderConfig:
    """Read the decoder's properties from config.json; missing keys take the defaults of the model family.

    Args:
        config: Content of config.json, of a supported model type.
        where: Name of the model in messages.

    Raises:
        UnsupportedModelError: The sizes are invalid, or the activation is not supported.
    """
    family = str(config["model_type"])
    given = {name: config[name] for name in SHAPE if config.get(name) is not None}
    try:
        whole = import_extra("transformers", "export").AutoConfig.for_model(family, **given)
        head_dim = getattr(whole, "head_dim", None) or whole.hidden_size // whole.num_attention_heads
    except MedusaError:
        raise
    except Exception as error:  # transformers checks each field in its own way
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"{where}: its config.json describes no {FAMILIES[family].name} ({reason}); expected the sizes of a model: "
            "fetch the file again"
        ) from error
    if type(head_dim) is not int or head_dim < 1:
        raise UnsupportedModelError(
            f"{where}: heads of {head_dim!r:.60} elements, expected a whole number above 0; repair its config.json"
        )
    activation = str(getattr(whole, "hidden_activation", None) or whole.hidden_act)
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{where}: activation {activation!r:.60} is not supported; expected one of {', '.join(ACTIVATIONS)}; use a "
            "model with another"
        )
    return DecoderConfig(family, head_dim, activation)
