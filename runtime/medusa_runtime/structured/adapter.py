"""Describes a model's tokenizer to llguidance, with none of its added tokens within reach of a text."""

from __future__ import annotations

import json
from typing import Any

from medusa_runtime.errors import ArgumentError
from medusa_runtime.facts import ModelFacts
from medusa_runtime.structured.library import refused
from medusa_runtime.tokenizer import Tokenizer

_HIDDEN = "\ue000{}\ue001"  # the name of a token that no text contains: characters for private use


def adapt_tokenizer(library: Any, tokenizer: Tokenizer, model: ModelFacts) -> Any:
    """Return a tokenizer as llguidance reads it, with a token for every logit.

    Added tokens, such as `<|im_end|>`, have other names there. What has to be written is text, even where it is the
    name of an added token: it is written with ordinary tokens. Otherwise llguidance would expect the added token there,
    which ends the answer, or is left out of its text.

    Args:
        library: The module `llguidance`.
        tokenizer: The tokenizer of the model.
        model: The model.

    Raises:
        ArgumentError: llguidance cannot read the tokenizer, or the model has no end token.
    """
    core, ends = tokenizer.core, list(model.eos_token_ids)
    if not ends:
        raise ArgumentError(
            "structured_outputs needs a model with an end token, which ends an answer that is complete; expected at "
            "least one in the bundle: build it from a model whose configuration names eos_token_id"
        )
    what = f"structured_outputs does not work with the tokenizer of {tokenizer.origin}"
    with refused(what, "a byte-level tokenizer, or one with a token for every byte: use another model"):
        size = max(model.vocab_size, core.get_vocab_size(with_added_tokens=True))
        return library.LLTokenizer(_hide_added_tokens(core.to_str()), n_vocab=size, eos_token=ends)


def _hide_added_tokens(tokenizer_json: str) -> str:
    """Rename the added tokens of a tokenizer's JSON; ids stay the same."""
    content = json.loads(tokenizer_json)
    names = {token["content"]: _HIDDEN.format(token["id"]) for token in content["added_tokens"]}
    for token in content["added_tokens"]:
        token["content"] = names[token["content"]]
    model = content["model"]
    if isinstance(vocabulary := model.get("vocab"), dict):
        model["vocab"] = {names.get(text, text): token for text, token in vocabulary.items()}
    elif isinstance(vocabulary, list):  # a Unigram's pairs of text and score
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    content["post_processor"] = None  # it names added tokens, and adds them to whole prompts only
    return json.dumps(content)
