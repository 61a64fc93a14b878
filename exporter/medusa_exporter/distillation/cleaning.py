"""What is kept of written rows: cut before a user turn that must not be in the data, and after the last answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from medusa_exporter.distillation.dataset import Row, group_of
from medusa_exporter.distillation.scripts import ANSWER, USER, Array, GeneratedRow, Request
from medusa_exporter.distillation.template_parts import Ids
from medusa_exporter.prompts import normalise

Decode = Callable[[list[Ids]], list[str]]


def clean_rows(
    streams: Sequence[Request], lines: Sequence[GeneratedRow], decode: Decode, refused: set[str], openings: set[str]
) -> list[Row]:
    """Return the data set's rows of written lines; a line without an answer left is dropped.

    A line ends before a user turn of the model's own that has no word or is in `refused` (normalised), and is dropped
    when it opens with one in `openings`, to which its own opening is added. decode: texts of token ids, without special
    tokens.
    """
    spans = [user_spans(line.roles) for line in lines]
    written = [line.tokens[start:stop] for line, own in zip(lines, spans, strict=True) for start, stop in own]
    texts = iter(decode(written))
    rows: list[Row] = []
    for stream, line, own in zip(streams, lines, spans, strict=True):
        turns = [next(texts).strip() for _ in own]
        unwanted = [not (key := normalise(turn)) or key in refused for turn in turns]
        if turns and not stream.turns:  # the model wrote the opening
            unwanted[0] = unwanted[0] or normalise(turns[0]) in openings
            openings.add(normalise(turns[0]))
        end = next((start for (start, _), bad in zip(own, unwanted, strict=True) if bad), len(line.tokens))
        kept = GeneratedRow(line.tokens[:end], line.roles[:end]).to_last_answer()
        if len(kept.tokens):
            opening = stream.turns[0] if stream.turns else turns[0]
            rows.append((kept.tokens.astype(np.int32), kept.roles == ANSWER, stream.temperature, group_of(opening)))
    return rows


def user_spans(roles: Array) -> list[tuple[int, int]]:
    """Where each user turn that the model wrote starts and stops."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], roles == USER, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
