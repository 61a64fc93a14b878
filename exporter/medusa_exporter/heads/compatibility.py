"""Checks whether heads fit a model from headers and configs alone, before any weights are loaded; without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors
from numpy.typing import NDArray

from medusa_exporter.heads.architecture import HeadArchitecture, stored_architecture
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.headers import StoredHeads, TensorInfo, find_heads
from medusa_exporter.heads.layouts import MAP_NAME, TAPS_NAME
from medusa_exporter.heads.taps import check_taps
from medusa_exporter.heads.vocabulary_padding import check_lm_head_rows, scored_tokens

Indices = NDArray[np.int64]


def check_heads(
    source: str | Path,
    hidden_size: int,
    vocab_size: int,
    layers: int,
    tokens: int | None = None,
) -> HeadArchitecture:
    """Check that heads fit a model. Of their values only token ids and layer numbers are read.

    Args:
        source: Folder or hub name of the heads.
        hidden_size: Hidden size of the model.
        vocab_size: Vocabulary size of the model.
        layers: Number of decoder layers of the model.
        tokens: Number of tokens of the model's tokenizer, `None` if it is not known.

    Returns:
        The architecture of the heads.

    Raises:
        HeadsError: The heads are damaged or were trained for another model.
    """
    stored = find_heads(source)
    facts = stored_architecture(stored)
    check_sizes(facts, hidden_size, vocab_size, source, tokens)
    taps, token_map = (_read_indices(stored, name) for name in (TAPS_NAME, MAP_NAME))
    check_indices(taps, token_map, stored.where, scored_tokens(facts, vocab_size))
    check_taps(tuple(taps.tolist()), layers, str(source))
    return facts


def check_sizes(
    facts: HeadArchitecture, hidden_size: int, vocab_size: int, source: str | Path, tokens: int | None = None
) -> None:
    """Raise HeadsError unless heads of this architecture fit a model; for the arguments see `check_heads`."""
    if facts.hidden_size != hidden_size:
        raise HeadsError(
            f"{source}: heads for hidden size {facts.hidden_size}, but the model's is {hidden_size}; "
            "give heads trained for this model"
        )
    if facts.draft_vocabulary is not None and facts.draft_vocabulary > vocab_size:
        raise HeadsError(
            f"{source}: heads with a draft vocabulary of {facts.draft_vocabulary} tokens, but the model's has "
            f"{vocab_size}; give heads trained for this model"
        )
    if facts.own_lm_head_size not in (None, facts.draft_vocabulary):
        check_lm_head_rows(facts.own_lm_head_size, vocab_size, source, tokens)


def check_indices(taps: Indices, token_map: Indices, where: str, scored: int | None = None) -> None:
    """Check that taps are distinct layers and that the ids of a token_map are distinct tokens.

    Args:
        taps: The tapped layers, empty if there are none.
        token_map: The ids of the draft vocabulary, empty if there is none.
        where: The file, for messages.
        scored: How many of the model's tokens, from 0 on, the heads can score; `None` if the model is not known.

    Raises:
        HeadsError: An index is negative, too large or repeated.
    """
    if min(taps, default=0) < 0 or len(np.unique(taps)) != len(taps):
        raise HeadsError(
            f"{where}: {TAPS_NAME} holds {taps.tolist()}; expected distinct layers, numbered from "
            "0: download or make the heads again"
        )
    if not len(token_map):
        return
    low, high = int(token_map.min()), int(token_map.max())
    if low < 0 or (scored is not None and high >= scored):
        last = "" if scored is None else f" to {scored - 1}"
        raise HeadsError(
            f"{where}: {MAP_NAME} holds ids from {low} to {high}, but the model's tokens are numbered from 0{last}; "
            "give heads trained for this model"
        )
    if repeated := len(token_map) - len(np.unique(token_map)):
        raise HeadsError(
            f"{where}: {MAP_NAME} repeats {repeated} of its ids; expected each token once: download or "
            "make the heads again"
        )


def _read_indices(stored: StoredHeads, name: str) -> Indices:
    """Read a small tensor of token ids or layer numbers; empty if the heads have none."""
    entry: TensorInfo | None = stored.entries.get(name)
    if entry is None:
        return np.zeros(0, np.int64)
    try:
        with safetensors.safe_open(entry.file, framework="numpy") as file:
            return np.asarray(file.get_tensor(entry.name), np.int64)
    except (safetensors.SafetensorError, ValueError) as error:
        raise HeadsError(f"{entry.file}: damaged safetensors file ({error}); download or make it again") from error
