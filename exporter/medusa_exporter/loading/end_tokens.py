"""Collects the token ids that end an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medusa_runtime.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def end_token_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """Return all token ids that end an answer, sorted and unique; () if the model defines none.

    The ids of the generation config, the config and the tokenizer are combined, because chat models often define the
    end of a turn in one of them and the end of a text in another. `models.load_model` has removed ids that come only
    from transformers' defaults.

    Args:
        model: The loaded model.
        tokenizer: Its tokenizer.

    Raises:
        UnsupportedModelError: An end token is not in the model's vocabulary.
    """
    generation = getattr(model, "generation_config", None)
    stated = {
        "generation_config.json": getattr(generation, "eos_token_id", None),
        "config.json": getattr(model.config, "eos_token_id", None),
        "the tokenizer": getattr(tokenizer, "eos_token_id", None),
    }
    vocabulary = model.get_input_embeddings().weight.shape[0]
    found: set[int] = set()
    for where, value in stated.items():
        for token in value if isinstance(value, (list, tuple)) else () if value is None else (value,):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                raise UnsupportedModelError(
                    f"{where} names {token!r} as an end token, expected token ids of 0 … {vocabulary - 1}, the model's "
                    "vocabulary; correct it there"
                )
            found.add(token)
    return tuple(sorted(found))
