"""What a config.json says of a decoder that decides which graphs can be made of it. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medusa_runtime.errors import MedusaError, UnsupportedModelError

from medusa_exporter.extras import import_extra
from medusa_exporter.families import ACTIVATIONS, FAMILIES, Decoder

# What a config leaves out where it is its family's own, or where it follows from the others
SHAPE = ("hidden_size", "num_attention_heads", "head_dim", "hidden_act", "hidden_activation")


def read_architecture(config: Mapping[str, Any], where: str) -> Decoder:
    """Describe a served model by its config.json, with the family's own values for what that leaves out.

    where: the model's name in messages. Raises UnsupportedModelError for sizes and activations that no graph is made
    of.
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
            f"{where}: activation {activation!r:.60} is not served; expected one of {', '.join(ACTIVATIONS)}; use a "
            "model with another"
        )
    return Decoder(family, head_dim, activation)
