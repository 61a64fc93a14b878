"""A tokenizer that reads control tokens under other names, so that their usual texts are ordinary text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from medusa_runtime.errors import BundleError, PromptError
from medusa_runtime.tokenizer import Tokenizer, check_unicode, translate_errors


class RenamedTokenizer:
    """A copy of a tokenizer with other names for its control tokens and the same ids.

    Args:
        tokenizer: The tokenizer to copy.
        names: The new name of each control token.
        share_model: Share the model, which costs no memory. A few models find control tokens in text by themselves,
            without the list of added tokens; for these, False copies the model and renames its tokens too.

    Attributes:
        unknown: Id of the token for characters without a token, None if there is none or the model is shared.

    Raises:
        BundleError: The library cannot copy the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, names: Mapping[str, str], *, share_model: bool) -> None:
        self._origin = tokenizer.origin
        core = tokenizer.core
        with translate_errors(BundleError, f"the tokenizer of {self._origin} cannot be copied with other names"):
            model, self.unknown = (core.model, None) if share_model else _renamed_model(core.to_str(), names)
            self._copy = tokenizers.Tokenizer(model)
            for part in ("normalizer", "pre_tokenizer", "post_processor"):
                if (found := getattr(core, part)) is not None:
                    setattr(self._copy, part, found)
            texts = {token: names.get(facts.content, facts.content) for token, facts in tokenizer.added_tokens.items()}
            added = tokenizer.added_tokens.values()
            self._copy.add_tokens([_with_name(facts, name) for facts, name in zip(added, texts.values(), strict=True)])
            # the copy has other ids for tokens that its model has, but not by these names
            self._ids = {self._copy.token_to_id(name): token for token, name in texts.items()}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text; arguments and errors as in `Tokenizer.encode`."""
        check_unicode(text)
        with translate_errors(PromptError, f"the prompt cannot be tokenised by the tokenizer of {self._origin}"):
            encoding = self._copy.encode(text, add_special_tokens=add_special_tokens)
        # the post-processor writes the ids of the original
        found = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [token if is_added else self._ids.get(token, token) for token, is_added in found]


def _with_name(facts: Any, name: str) -> Any:
    return tokenizers.AddedToken(
        name,
        single_word=facts.single_word,
        lstrip=facts.lstrip,
        rstrip=facts.rstrip,
        normalized=facts.normalized,
        special=facts.special,
    )


def _renamed_model(tokenizer_json: str, names: Mapping[str, str]) -> tuple[Any, int | None]:
    """Copy a model with other names for control tokens, without merges that make them up from parts.

    Return it and the id of its token for unknown characters.
    """
    model = json.loads(tokenizer_json)["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        unknown = vocabulary.get(model["unk_token"])
        model["vocab"] = {names.get(text, text): token for text, token in vocabulary.items()}
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    else:  # a Unigram's pairs of text and score; the id is the place
        unknown = model["unk_id"]
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if merges := model.get("merges"):
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            [left, right] for left, right in merges if names.keys().isdisjoint((left, right, left + right[prefix:]))
        ]
    copy = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return copy.model, unknown
