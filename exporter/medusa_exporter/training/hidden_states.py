"""Runs the frozen decoder over a data set and collects hidden states and the target token of each head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from medusa_runtime.errors import UnsupportedModelError
from torch import Tensor

from medusa_exporter.console import Progress
from medusa_exporter.distillation.dataset import DataError, DataSet
from medusa_exporter.heads.taps import capture_taps
from medusa_exporter.training.model_digest import is_distilled_from
from medusa_exporter.training.state_storage import allocate_states

IGNORED = -100  # target that does not count: past the end of its row, or not part of an answer
TOKENS_PER_PASS = {"cuda": 65_536, "cpu": 2_048}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Positions:
    """P positions t of a data set whose next token belongs to an answer.

    Attributes:
        hidden: (P, S) what the heads see of t: the hidden state after the final norm, followed by the tapped states. It
            may be stored on another device than the rest, see `state_storage.allocate_states`.
        root: (P,) int32, token t+1.
        targets: (P, K) int32, token t+2+k for head k, or `IGNORED`.
        row: (P,) int32, on the CPU, the row of the data set.
        place: (P,) int64, t counted over all rows.
    """

    hidden: Tensor
    root: Tensor
    targets: Tensor
    row: Tensor
    place: Tensor

    def __len__(self) -> int:
        return len(self.root)


def pick_device(name: str) -> str:
    """Resolve 'auto' to 'cuda' if there is a GPU, else 'cpu'; raise UnsupportedModelError for a missing GPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(name).type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModelError(f"device {name!r} was asked for, but torch finds no GPU; use --device cpu")
    return name


def pick_dtype(name: str, device: str) -> torch.dtype:
    """Resolve 'auto' to bfloat16 on a GPU and float32 on a CPU; other names are keys of `DTYPES`."""
    return DTYPES[("bfloat16" if device.startswith("cuda") else "float32") if name == "auto" else name]


def check_model(data: DataSet, model: Any, name: str) -> None:
    """Raise DataError unless `data` was distilled from `model`."""
    if not is_distilled_from(data.facts.digest, model):
        raise DataError(
            f"the data was distilled from {data.facts.model}, whose sizes or weights differ from those of {name}; "
            "heads learn their own decoder's answers only: distill with this model, or train for that one"
        )


def collect_positions(
    model: Any,
    data: DataSet,
    heads: int,
    *,
    taps: tuple[int, ...] = (),
    label: str = "hidden states",
    disk: Path | None = None,
) -> Positions:
    """Run the decoder once over all rows and store the states of the positions that count, in the model's dtype.

    Args:
        model: The decoder.
        data: The data set.
        heads: Number of heads, K.
        taps: Decoder layers whose normalised input is stored too.
        label: Label of the progress bar.
        disk: Folder for a temporary file, if the states fit neither the device nor host memory.

    Raises:
        CapacityError: The states fit nowhere.
        DataError: No position counts.
        HeadsError: The decoder has no such layer.
    """
    places, root, targets, row = _answer_places(data, heads)
    if len(places) == 0:
        raise DataError("no answer of two tokens or more in these rows; expected some: distill more prompts")
    width, device = model.config.hidden_size * (1 + len(taps)), model.device
    extra = root.itemsize + places.itemsize + targets.itemsize * heads
    hidden = allocate_states(len(places), width, model.dtype, device, disk, extra)
    progress = Progress().bar(label, len(data.tokens), "tokens")
    with torch.no_grad(), progress as bar, capture_taps(model, taps) as caught:
        for rows in _batches(data, TOKENS_PER_PASS[device.type]):
            lengths = np.diff(data.offsets)[rows]
            ids = np.zeros(
                (len(rows), int(lengths.max())), np.int64
            )  # padded on the right, where causal attention does not look
            for line, index in zip(ids, rows, strict=True):
                tokens, _ = data.row(index)
                line[: len(tokens)] = tokens
            states = model.base_model(input_ids=torch.from_numpy(ids).to(device), use_cache=False).last_hidden_state
            starts, stops = np.searchsorted(places, data.offsets[rows]), np.searchsorted(places, data.offsets[rows + 1])
            chosen = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
            line_start = np.repeat(np.arange(len(rows)) * ids.shape[1] - data.offsets[rows], stops - starts)
            selected = torch.from_numpy(places[chosen] + line_start).to(device)
            seen = [
                state.flatten(0, 1)[selected] for state in (states, *(caught[layer] for layer in taps))
            ]  # (n, H) each
            hidden[torch.from_numpy(chosen).to(hidden.device)] = torch.cat(seen, dim=-1).to(hidden.device)
            bar.advance(int(lengths.sum()))
    on_device = [torch.from_numpy(array).to(device) for array in (root, targets, places)]
    return Positions(hidden, on_device[0], on_device[1], torch.from_numpy(row), on_device[2])


def _answer_places(data: DataSet, heads: int) -> tuple[Any, Any, Any, Any]:
    """Return places (P,) int64 in data.tokens, increasing; root (P,) int32; targets (P, K) int32; row (P,) int32.

    A place t counts if tokens t+1 and t+2 belong to an answer in the same row; otherwise no head has a target. For a
    row [10, 11, 12, 13, 14] whose answer is [12, 13, 14] and two heads, places are 1 and 2, their roots 12 and 13, and
    their targets [13, 14] and [14, IGNORED].
    """
    count = len(data.tokens)
    row = np.repeat(np.arange(data.rows, dtype=np.int32), np.diff(data.offsets))  # (T,)
    counts_as = np.zeros(count + heads + 2, bool)
    counts_as[:count] = data.answer
    rows = np.concatenate([row, np.full(heads + 2, -1, np.int32)])
    tokens = np.concatenate([data.tokens.astype(np.int32), np.zeros(heads + 2, np.int32)])
    alive = counts_as[1 : count + 1] & (rows[1 : count + 1] == row)
    places = np.flatnonzero(alive & counts_as[2 : count + 2] & (rows[2 : count + 2] == row))
    targets = np.full((len(places), heads), IGNORED, np.int32)
    valid = np.ones(len(places), bool)
    for head in range(heads):  # a target counts only if all tokens before it do
        ahead = places + 2 + head
        valid = valid & counts_as[ahead] & (rows[ahead] == rows[places])
        targets[valid, head] = tokens[ahead[valid]]
    return places, tokens[places + 1], targets, row[places]


def _batches(data: DataSet, budget: int) -> Iterator[Any]:
    """Yield row numbers (n,) of similar length, n times the longest within `budget` tokens, without rows under 3."""
    lengths = np.diff(data.offsets)
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] >= 3]
    start = 0
    while start < len(order):
        size = max(1, budget // int(lengths[order[start]]))
        yield np.sort(order[start : start + size])
        start += size
