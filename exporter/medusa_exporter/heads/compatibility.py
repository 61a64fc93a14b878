"""Whether heads fit a model, by headers alone: before anything of the model is loaded. Without torch."""

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

Numbers = NDArray[np.int64]


def check_heads(
    source: str | Path,
    hidden_size: int,
    vocab_size: int,
    layers: int,
    tokens: int | None = None,
) -> HeadArchitecture:
    """Check heads for a model of H, V and so many decoder layers; return what they are.

    tokens: how many tokens the model's tokenizer has, where that is known. Of the heads' values only those that number
    tokens and layers are read. Raises HeadsError for heads that are damaged or made for another model.
    """
    stored = find_heads(source)
    facts = stored_architecture(stored)
    check_sizes(facts, hidden_size, vocab_size, source, tokens)
    taps, token_map = (_numbers(stored, name) for name in (TAPS_NAME, MAP_NAME))
    check_indices(taps, token_map, stored.where, scored_tokens(facts, vocab_size))
    check_taps(tuple(taps.tolist()), layers, str(source))
    return facts


def check_sizes(
    facts: HeadArchitecture, hidden_size: int, vocab_size: int, source: str | Path, tokens: int | None = None
) -> None:
    """Raise HeadsError unless heads with these facts fit a model of H and V; tokens: see `check_heads`."""
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


def check_indices(taps: Numbers, token_map: Numbers, where: str, scored: int | None = None) -> None:
    """Raise HeadsError unless taps are distinct layers and a token_map's ids distinct tokens.

    taps, token_map: any length, empty where the heads have none. scored: how many of the model's tokens, from 0 on, the
    heads can score, None where the model is not known.
    """
    if min(taps, default=0) < 0 or len(np.unique(taps)) != len(taps):
        raise HeadsError(
            f"{where}: {TAPS_NAME} holds {taps.tolist()}; expected distinct layers, numbered from 0. Damaged"
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
        raise HeadsError(f"{where}: {MAP_NAME} repeats {repeated} of its ids; expected each token once. Damaged")


def _numbers(stored: StoredHeads, name: str) -> Numbers:
    """Read one weight that holds numbers of tokens or layers, which is small; empty where the heads have none."""
    entry: TensorInfo | None = stored.entries.get(name)
    if entry is None:
        return np.zeros(0, np.int64)
    try:
        with safetensors.safe_open(entry.file, framework="numpy") as file:
            return np.asarray(file.get_tensor(entry.name), np.int64)
    except (safetensors.SafetensorError, ValueError) as error:
        raise HeadsError(f"{entry.file}: damaged safetensors file ({error}); fetch or make it again") from error
