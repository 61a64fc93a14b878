"""Scripted rows: a language model that is a table, and a reader of its rows for plain and tree decoding."""

import numpy as np
from medusa_runtime.backends.base import RowSummary
from medusa_runtime.errors import InvalidLogitsError

SUMMARY = 64


def summary_of(logits, entries=SUMMARY, rng=None):
    """A summary of a row as a graph may compute it: descending, equal logits in an inconvenient order.

    That is by descending id, or in the order of `rng`; the logsumexp is in float32.
    """
    ties = -np.arange(len(logits)) if rng is None else rng.permutation(len(logits))
    ids = np.lexsort((ties, -logits))[:entries]
    wide = logits.astype(np.float64)
    finite = bool(np.isfinite(logits).all())
    with np.errstate(invalid="ignore"):
        logsumexp = wide.max() + np.log(np.exp(wide - wide.max()).sum())
    return RowSummary(ids.astype(np.int32), logits[ids], float(np.float32(logsumexp)), finite)


class ScriptedModel:
    """Logits that depend on the last two tokens; equal contexts have equal rows."""

    def __init__(self, vocab_size=8, spread=1.5, seed=0):
        self.vocab_size, self.spread, self.seed = vocab_size, spread, seed

    def logits(self, tokens):
        """(V,) float32 behind these tokens."""
        context = [token + 1 for token in tokens[-2:]]
        rng = np.random.default_rng([self.seed, len(context), *context])
        return rng.normal(scale=self.spread, size=self.vocab_size).astype(np.float32)


class ScriptedRows:
    """A RowReader over the rows of one step; `read` and `summarised` list the rows that were asked for."""

    def __init__(self, logits, entries=None):
        self.logits = np.asarray(logits, dtype=np.float32)
        self.logits.flags.writeable = False
        self.entries, self.read, self.summarised = entries, [], []

    @classmethod
    def of_tree(cls, model, before, tree, tokens, entries=None):
        """The rows of a step over a tree.

        `before`: tokens before the root. `tokens`: one for each node, the root's first.
        """
        paths = []
        for node, parent in enumerate(tree.parents):
            paths.append([*(paths[int(parent)] if node else before), int(tokens[node])])
        return cls([model.logits(path) for path in paths], entries)

    def __call__(self, row, /):
        self.read.append(row)
        if not np.isfinite(self.logits[row]).all():
            raise InvalidLogitsError(f"row {row} is not finite")
        return self.logits[row]

    def summary(self, row, /):
        self.summarised.append(row)
        if self.entries is None:
            return None
        found = summary_of(self.logits[row], self.entries)
        if not found.finite:
            raise InvalidLogitsError(f"row {row} is not finite")
        return found


def plain_answer(sampler, model, prompt, length, entries=None):
    """The tokens of an answer, one step each."""
    output = []
    for _ in range(length):
        output.append(sampler.choose(ScriptedRows([model.logits([*prompt, *output])], entries), 0, output))
    return output
