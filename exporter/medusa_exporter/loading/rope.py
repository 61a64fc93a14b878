"""Checks rotary position embeddings (RoPE), and chooses the context length for which a graph is correct.

A graph contains one table of rotation angles for all positions. A RoPE type whose frequencies depend on the sequence
length is therefore supported only within the range in which they stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medusa_runtime.errors import CapacityError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Supported RoPE types, and the parameters that each one requires.
TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
OLD_NAMES = {
    ("phi3", "su"): "longrope",
    ("phi3", "yarn"): "longrope",
}  # older names in a Phi-3's config, as transformers reads them
MIN_CONTEXT = 128  # tokens; a shorter context has no room for a prompt and the steps of a tree


def check_rope(config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedModelError if the model's RoPE type or its parameters are not supported.

    Args:
        config: Content of config.json.
        where: Name of the model in the message.
    """
    rope = _parameters(config)
    if not isinstance(rope, Mapping):
        raise UnsupportedModelError(
            f"{where}: RoPE parameters {rope!r:.60}, expected an object; repair its config.json"
        )
    if nested := sorted(name for name, value in rope.items() if isinstance(value, Mapping)):
        raise UnsupportedModelError(
            f"{where}: separate RoPE parameters for {', '.join(nested)}, expected the same RoPE in all layers; "
            "use a model of another family"
        )
    kind = _type(config)
    if kind not in TYPES:
        reason = (
            " (its frequencies depend on the sequence length, but a graph has one table)" if kind == "dynamic" else ""
        )
        raise UnsupportedModelError(
            f"{where}: RoPE type {kind!r} is not supported{reason}; expected one of {', '.join(TYPES)}; "
            "use a model with another RoPE type"
        )
    for name in TYPES[kind]:
        values = rope.get(name)
        values = values if isinstance(values, list) and kind == "longrope" else [values]
        if name == "factor" and kind == "yarn" and values == [None] and name in rope:
            continue  # transformers then uses the ratio of the two lengths
        if not values or not all(_is_positive(value) for value in values):
            raise UnsupportedModelError(
                f"{where}: {kind} RoPE with {name} {rope.get(name)!r:.60}, expected a number above 0"
                f"{' for each pair' if kind == 'longrope' else ''}; repair its config.json"
            )


def choose_context(config: Mapping[str, Any], wanted: int | None, where: str) -> int:
    """Return the context length of a bundle in tokens.

    Args:
        config: Content of config.json.
        wanted: Requested length; None is the model's `max_position_embeddings`. With YaRN it may reach the original
            length times the factor, even if `max_position_embeddings` is smaller.
        where: Name of the model in messages.

    Raises:
        CapacityError: `wanted` exceeds what the model supports, or is below `MIN_CONTEXT`.
        UnsupportedModelError: The config is invalid, or the length exceeds that at which longrope's frequencies change.
    """
    trained = config.get("max_position_embeddings")
    if type(trained) is not int or trained < 1:
        raise UnsupportedModelError(
            f"{where}: max_position_embeddings is {trained!r:.60}, expected a whole number of at least 1; "
            "repair its config.json"
        )
    longest = longest_context(config, trained)
    if wanted is not None and not min(MIN_CONTEXT, longest) <= wanted <= longest:
        raise CapacityError(
            f"--context {wanted}: {where} supports up to {longest} tokens, and a bundle needs at least "
            f"{MIN_CONTEXT}; give a number between the two"
        )
    context = wanted or trained
    if (change := changes_at(config)) is not None and context > change:
        raise UnsupportedModelError(
            f"{where}: its longrope uses other frequencies beyond {change} tokens, so a graph of {context} tokens "
            f"would be wrong below or above that; expected at most {change}: set --context {change}"
        )
    return context


def longest_context(config: Mapping[str, Any], trained: int) -> int:
    """Return the longest supported context in tokens; `trained` is max_position_embeddings, which YaRN may exceed."""
    if _type(config) != "yarn":
        return trained
    rope = _parameters(config)
    return max(trained, int((rope.get("original_max_position_embeddings") or trained) * (rope.get("factor") or 1)))


def changes_at(config: Mapping[str, Any]) -> int | None:
    """Return the length up to which longrope uses its short factors; None if the frequencies never change."""
    rope = _parameters(config)
    if _type(config) != "longrope" or rope["short_factor"] == rope["long_factor"]:
        return None
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return int(original or config["max_position_embeddings"])


def fix_longrope(model: PreTrainedModel) -> None:
    """Make longrope use its short factors for every length, which `choose_context` has limited accordingly.

    Otherwise transformers would choose by the largest position of each call, and the choice would be traced.
    """
    rope: Any = getattr(model.base_model, "rotary_emb", None)
    if getattr(rope, "rope_type", None) == "longrope":
        rope.rope_type = "default"  # keeps the current frequencies, which are those of the short factors


def _parameters(config: Mapping[str, Any]) -> Any:
    """Return the RoPE parameters; transformers prefers the older of the two keys."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _type(config: Mapping[str, Any]) -> str:
    rope = _parameters(config)
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    return OLD_NAMES.get((str(config.get("model_type")), kind), kind)


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]
