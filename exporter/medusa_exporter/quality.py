"""What quantised weights cost: a graph's next-token distributions beside those of another, on the same text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from medusa_runtime.backends import Backend
from medusa_runtime.backends.base import FloatArray, literal_step
from medusa_runtime.kv_cache import KvCache

Probabilities = npt.NDArray[np.float64]

CHUNK = 64  # tokens a step: 49,152 logits of each are 13 MB


@dataclass(frozen=True)
class Text:
    """Tokens of a prompt and its answer; the distributions at the answer's tokens are compared."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Quality:
    """A graph beside the reference, over `positions` answer tokens.

    agreement: the share of them at which both find the same token likeliest. divergence: mean KL(reference || graph),
    in nats. perplexity: of the graph, on these tokens; reference_perplexity: of the reference.
    """

    positions: int
    agreement: float
    divergence: float
    perplexity: float
    reference_perplexity: float


def measure(reference: Backend, graph: Backend, texts: Iterable[Text]) -> Quality:
    """Run both over each text, chunk by chunk, and compare what they say of every answer token.

    Raises ValueError when no text has an answer.
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
    """Yield log p (V,) of each answer token, given the tokens before it."""
    if not text.answer:
        return
    cache = KvCache(backend)
    ids = np.array([*text.prompt, *text.answer[:-1]], dtype=np.int32)
    cache.reserve(len(ids))
    first = len(text.prompt) - 1  # the row that says what the answer's first token is
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        rows = np.arange(max(0, first - start), max(0, first - start, len(chunk)), dtype=np.int32)
        # At least one row, read or not: ONNX Runtime 1.31 gives ArgMax over no rows another shape
        backend.run(literal_step(chunk, start, rows if len(rows) else np.zeros(1, dtype=np.int32)))
        for row in range(len(rows)):
            yield _log_softmax(backend.read_logits(row))
        cache.commit(range(len(chunk)))


def as_table(found: dict[str, Quality]) -> str:
    """Lay out the qualities of several precisions."""
    lines = [f"{'precision':<10}  argmax agreement  mean KL  perplexity  of the reference  positions"]
    for name, one in found.items():
        lines.append(
            f"{name:<10}  {one.agreement:16.2%}  {one.divergence:7.4f}  {one.perplexity:10.3f}"
            f"  {one.reference_perplexity:16.3f}  {one.positions:9,}"
        )
    return "\n".join(lines)


def _log_softmax(logits: FloatArray) -> Probabilities:
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - math.log(float(np.exp(shifted).sum()))
