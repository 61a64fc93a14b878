"""Cleans generated rows: they end before a user turn that must not be in the data, and after their last answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from medusa_exporter.distillation.dataset import Row, group_of
from medusa_exporter.distillation.scripts import ANSWER, USER, Array, GeneratedRow, Request
from medusa_exporter.distillation.template_parts import Ids
from medusa_exporter.prompts import normalise

Decode = Callable[[list[Ids]], list[str]]


def clean_rows(
    requests: Sequence[Request],
    generated: Sequence[GeneratedRow],
    decode: Decode,
    refused: set[str],
    openings: set[str],
) -> list[Row]:
    """Return the data set's rows of a batch; a row without an answer left is dropped.

    A row ends before a generated user turn that has no word or is in `refused`. A row whose generated first turn is in
    `openings` is dropped.

    Args:
        requests: The requests of the batch.
        generated: The row of each request.
        decode: Decodes token ids to texts, without special tokens.
        refused: Normalised user turns that must not be in the data.
        openings: Normalised first turns that are in the data already; those of this batch are added.
    """
    spans = [user_spans(row.roles) for row in generated]
    turns_written = [row.tokens[start:stop] for row, own in zip(generated, spans, strict=True) for start, stop in own]
    texts = iter(decode(turns_written))
    rows: list[Row] = []
    for request, row, own in zip(requests, generated, spans, strict=True):
        turns = [next(texts).strip() for _ in own]
        unwanted = [not (key := normalise(turn)) or key in refused for turn in turns]
        if turns and not request.turns:  # the model generated the first turn
            unwanted[0] = unwanted[0] or normalise(turns[0]) in openings
            openings.add(normalise(turns[0]))
        end = next((start for (start, _), bad in zip(own, unwanted, strict=True) if bad), len(row.tokens))
        kept = GeneratedRow(row.tokens[:end], row.roles[:end]).to_last_answer()
        if len(kept.tokens):
            opening = request.turns[0] if request.turns else turns[0]
            rows.append((kept.tokens.astype(np.int32), kept.roles == ANSWER, request.temperature, group_of(opening)))
    return rows


def user_spans(roles: Array) -> list[tuple[int, int]]:
    """Return where each generated user turn starts and stops."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], roles == USER, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
