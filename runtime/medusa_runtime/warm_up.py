"""The steps that prepare a backend: one of every shape that answers can need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from medusa_runtime.backends.base import Backend, Step, literal_step
from medusa_runtime.kv_cache import KvCache
from medusa_runtime.tree_step import TreeStep

WARM_UP_RUNS = 2  # of each shape: the second one is captured as a CUDA graph on a GPU


def warm_up_steps(backend: Backend, cache: KvCache, trees: Sequence[TreeStep]) -> Iterator[Step]:
    """Yield a step of each tree behind a past of every padded length, then prompts of every power of two.

    A step whose rows are summarised is of another shape than one whose rows are not. The prompts are of the kinds that
    the trees are of: with trees of both kinds, of both.

    Args:
        backend: The backend that will run the steps.
        cache: Its KV cache, in which rows are reserved for each step.
        trees: The trees to prepare, each once.
    """
    context, past_lengths = cache.context, backend.padded_past_lengths
    for past, tree in product(past_lengths or (0,), dict.fromkeys(trees)):
        length = min(past, context - tree.tree.size)
        if length >= 0:
            cache.reserve(length + tree.tree.size)
            tree.update(0, length, (0,) * tree.tree.literals)
            yield tree.step
    sizes = [1 << doublings for doublings in range(backend.prefill_chunk.bit_length())]
    kinds = dict.fromkeys(tree.step.summaries for tree in trees)
    for past, size, summaries in product(past_lengths, sizes, kinds):
        if size <= context:
            ids, last = np.zeros(size, np.int32), np.array([size - 1], np.int32)
            yield literal_step(ids, min(past, context - size), last, summaries)
