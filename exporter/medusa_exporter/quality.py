"""Measures what quantisation costs: compares the next-token distributions of two graphs on the same text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from medusa_runtime.backends import Backend
from medusa_runtime.backends.base import FloatArray, literal_step
from medusa_runtime.kv_cache import KvCache

from medusa_exporter.console import table

Probabilities = npt.NDArray[np.float64]

CHUNK = 64  # tokens in a step: their logits over 49,152 words take 13 MB


@dataclass(frozen=True)
class Text:
    """The token ids of a prompt and of its answer; distributions are compared at the tokens of the answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Quality:
    """How close a graph is to the reference, over all answer tokens.

    Attributes:
        positions: Number of answer tokens.
        agreement: Share of positions at which both have the same most likely token.
        divergence: Mean of KL(reference || graph), in nats.
        perplexity: Perplexity of the graph on these tokens.
        reference_perplexity: Perplexity of the reference on these tokens.
    """

    positions: int
    agreement: float
    divergence: float
    perplexity: float
    reference_perplexity: float


def measure_quality(reference: Backend, graph: Backend, texts: Iterable[Text]) -> Quality:
    """Run both graphs over each text, chunk by chunk, and compare their distributions at every answer token.

    Args:
        reference: The graph to compare with, usually fp32.
        graph: The graph to measure, usually quantised.
        texts: The prompts and answers.

    Raises:
        ValueError: No text has an answer.
    """
    positions = agreed = 0
    divergence = own = expected = 0.0
    for text in texts:
        pairs = zip(log_probabilities(reference, text), log_probabilities(graph, text), text.answer, strict=True)
        for wanted, found, token in pairs:
            positions += 1
            agreed += int(wanted.argmax() == found.argmax())
            divergence += float(np.exp(wanted) @ (wanted - found))
            own -= float(found[token])
            expected -= float(wanted[token])
    if not positions:
        raise ValueError("no answer to measure on; expected texts with at least one answer token")
    return Quality(
        positions,
        agreed / positions,
        divergence / positions,
        math.exp(own / positions),
        math.exp(expected / positions),
    )


def log_probabilities(backend: Backend, text: Text) -> Iterator[Probabilities]:
    """Yield the log probabilities, shape (V,), at each answer token given the tokens before it."""
    if not text.answer:
        return
    cache = KvCache(backend)
    ids = np.array([*text.prompt, *text.answer[:-1]], dtype=np.int32)
    cache.reserve(len(ids))
    first = len(text.prompt) - 1  # the row that predicts the first token of the answer
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        rows = np.arange(max(0, first - start), max(0, first - start, len(chunk)), dtype=np.int32)
        # Always at least one row: ONNX Runtime 1.31 returns another shape from ArgMax over no rows
        backend.run(literal_step(chunk, start, rows if len(rows) else np.zeros(1, dtype=np.int32)))
        for row in range(len(rows)):
            yield _log_softmax(backend.read_logits(row))
        cache.commit(range(len(chunk)))


def as_table(found: dict[str, Quality]) -> str:
    """Format the quality of several precisions as a table."""
    headings = ("precision", "same top token", "mean KL", "perplexity", "of fp32", "positions")
    rows = [
        (
            name,
            f"{one.agreement:.2%}",
            f"{one.divergence:.4f}",
            f"{one.perplexity:.3f}",
            f"{one.reference_perplexity:.3f}",
            f"{one.positions:,}",
        )
        for name, one in found.items()
    ]
    return table(headings, rows)


def _log_softmax(logits: FloatArray) -> Probabilities:
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - math.log(float(np.exp(shifted).sum()))
