"""Which ropes are served, and for how many positions a bundle is right.

A graph holds one table of angles for all lengths, so a rope whose frequencies change with the length is served only
within the range of one of its sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medusa_runtime.errors import CapacityError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The rope types that are served, and the parameters that each one cannot do without.
TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
OLD_NAMES = {("phi3", "su"): "longrope", ("phi3", "yarn"): "longrope"}  # as transformers reads a Phi-3's
LEAST_CONTEXT = 128  # tokens of a bundle: with less there is no room for a prompt and the steps of a tree


def check_rope(config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedModelError for a rope that is not served.

    config: as a config.json holds it. where: the model's name in the message.
    """
    rope = _parameters(config)
    if not isinstance(rope, Mapping):
        raise UnsupportedModelError(
            f"{where}: rope parameters {rope!r:.60}, expected an object; repair its config.json"
        )
    if nested := sorted(name for name, value in rope.items() if isinstance(value, Mapping)):
        raise UnsupportedModelError(
            f"{where}: rope parameters of their own for {', '.join(nested)}, expected one rope for all layers; "
            "use a model of another family"
        )
    kind = _type(config)
    if kind not in TYPES:
        reason = (
            " (its frequencies depend on the length seen, which a graph cannot follow)" if kind == "dynamic" else ""
        )
        raise UnsupportedModelError(
            f"{where}: rope type {kind!r} is not served{reason}; expected one of {', '.join(TYPES)}; "
            "use a model with another rope"
        )
    for name in TYPES[kind]:
        values = rope.get(name)
        values = values if isinstance(values, list) and kind == "longrope" else [values]
        if name == "factor" and kind == "yarn" and values == [None] and name in rope:
            continue  # transformers then takes the ratio of the two lengths
        if not values or not all(_is_positive(value) for value in values):
            raise UnsupportedModelError(
                f"{where}: {kind} rope with {name} {rope.get(name)!r:.60}, expected a number above 0"
                f"{' for each pair' if kind == 'longrope' else ''}; repair its config.json"
            )


def choose_context(config: Mapping[str, Any], wanted: int | None, where: str) -> int:
    """Return the tokens that a bundle is made for: `wanted`, or the model's `max_position_embeddings` where it is None.

    A YaRN rope reaches to its factor times the original length even where max_position_embeddings was left at that.
    Raises CapacityError for more than the model supports or less than LEAST_CONTEXT, UnsupportedModelError for a
    longrope beyond the length at which its frequencies change.
    """
    trained = config.get("max_position_embeddings")
    if type(trained) is not int or trained < 1:
        raise UnsupportedModelError(
            f"{where}: max_position_embeddings is {trained!r:.60}, expected a whole number of at least 1; "
            "repair its config.json"
        )
    longest = longest_context(config, trained)
    if wanted is not None and not min(LEAST_CONTEXT, longest) <= wanted <= longest:
        raise CapacityError(
            f"--context {wanted}: {where} supports up to {longest} tokens, and a bundle needs at least "
            f"{LEAST_CONTEXT}; give a number between the two"
        )
    context = wanted or trained
    if (change := changes_at(config)) is not None and context > change:
        raise UnsupportedModelError(
            f"{where}: its longrope takes other frequencies beyond {change} tokens, so that a graph of {context} "
            f"would be wrong below or above; expected at most {change}: give --context {change}"
        )
    return context


def longest_context(config: Mapping[str, Any], trained: int) -> int:
    """Return the tokens that a model supports. trained: its max_position_embeddings, which YaRN may reach beyond."""
    if _type(config) != "yarn":
        return trained
    rope = _parameters(config)
    return max(trained, int((rope.get("original_max_position_embeddings") or trained) * (rope.get("factor") or 1)))


def changes_at(config: Mapping[str, Any]) -> int | None:
    """Return the length up to which a longrope takes its short factors; None for ropes that are the same for all."""
    rope = _parameters(config)
    if _type(config) != "longrope" or rope["short_factor"] == rope["long_factor"]:
        return None
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return int(original or config["max_position_embeddings"])


def fix_longrope(model: PreTrainedModel) -> None:
    """Let a longrope keep its short factors for every length: the caller has bounded the length by `choose_context`.

    Otherwise transformers would choose by the largest position of each call, and the choice would be traced.
    """
    rope: Any = getattr(model.base_model, "rotary_emb", None)
    if getattr(rope, "rope_type", None) == "longrope":
        rope.rope_type = "default"  # whose frequencies, already those of the short factors, are never touched


def _parameters(config: Mapping[str, Any]) -> Any:
    """The rope's parameters, of which transformers prefers the older name."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _type(config: Mapping[str, Any]) -> str:
    rope = _parameters(config)
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    return OLD_NAMES.get((str(config.get("model_type")), kind), kind)


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]
