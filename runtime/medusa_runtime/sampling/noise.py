"""The draw of a token: an exponential race whose noise depends on (seed, answer, position, token id) only.

Token i has the weight w_i = exp(l_i / T) and a random number E_i of the exponential distribution with mean 1; the token
with the largest w_i / E_i wins, which happens with probability w_i / Σ w (the Gumbel-max method, as -log E_i is a
Gumbel variable). Since E_i is a function of the position and the token's id, the winner does not depend on the order
of the tokens, on a normaliser, or on how many tokens a step verifies: only logits that change by more than the gap
between the two best scores change it.

Cost: E = -log(1 - v) with v = (h + f) / 2**32, where h is a hash of 32 bits and f, from 0 to 1, another one. As E ≥ v ≥
h / 2**32, the quotient w · 2**32 / h is an upper bound of the score. So h is computed for all tokens, in integers, and
the score only for those that can win: likely tokens, and others whose h is so small that they could reach the best
score so far. Tokens are taken in blocks, so that each block begins with the best score of those before.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import FloatArray
from medusa_runtime.sampling.scratch import thread_scratch

WordArray = NDArray[np.uint32]
DoubleArray = NDArray[np.float64]

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-30, 1e30  # beyond, logits divided by it leave float32's range
FEW = 512  # tokens whose scores are computed without looking for rivals first
SMALL_HASHES = 64  # so many of all tokens, on average, have hashes with which unlikely tokens may win
FIRST_BLOCK = 8192  # tokens of a flat row's first block, whose best score excludes most tokens of the others
BLOCK = 65_536  # tokens of the others: their arrays fit the CPU's caches and are not allocated anew
SLACK = 1e-3  # relative error of the bounds, which float32 keeps below 1e-4
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # the increment of splitmix64
_SHIFT_1, _SHIFT_2 = np.uint32(16), np.uint32(15)
_FACTOR_1, _FACTOR_2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
_LEAST_HASH = np.float32(2.0**-33)  # f is at least 2**-33, so that h + f is never 0
_LARGEST = 1.0 - 2.0**-53  # the largest float64 below 1


class DrawKey(NamedTuple):
    """The key of one draw: for each of the hashes, h and f, two random words.

    Args:
        first: (2, 1), the first word of h and that of f.
        second: (2, 1), the second words.
    """

    first: WordArray
    second: WordArray

    @property
    def of_h(self) -> DrawKey:
        """The words of h alone, (1,) each."""
        return DrawKey(self.first[0], self.second[0])


def draw_key(seed: int, choice: int, position: int) -> DrawKey:
    """Return the key of the draw of one token.

    Args:
        seed: Seed of the request, from 0 to 2**64 - 1.
        choice: Index of the answer among the request's.
        position: Index of the token in the answer.
    """
    state = 0
    for part in (seed, choice, position):
        state = _mix(state ^ part)
    words = np.array([_mix(state ^ 1), _mix(state ^ 2)], dtype=np.uint64)[:, None]
    return DrawKey((words >> np.uint64(32)).astype(np.uint32), words.astype(np.uint32))


def _mix(state: int) -> int:
    """One step of splitmix64 (Steele, Lea and Flood, 2014): 64 bits to 64 well mixed bits, one to one."""
    state = (state + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def hash_ids(ids: WordArray, key: DrawKey, out: WordArray, shifted: WordArray) -> WordArray:
    """Write a 32-bit hash of each id into `out`: two rounds of shift, xor and multiply, each with a word of the key.

    Args:
        ids: (n,) token ids.
        key: The key; its `of_h` for h alone.
        out: (n,) for h, or (2, n) for h and f.
        shifted: Like `out`, for intermediate values.

    Returns:
        `out`.
    """
    np.add(ids, key.first, out=out)
    np.right_shift(out, _SHIFT_1, out=shifted)
    np.bitwise_xor(out, shifted, out=out)
    np.multiply(out, _FACTOR_1, out=out)
    np.bitwise_xor(out, key.second, out=out)
    np.right_shift(out, _SHIFT_2, out=shifted)
    np.bitwise_xor(out, shifted, out=out)
    np.multiply(out, _FACTOR_2, out=out)
    np.right_shift(out, _SHIFT_1, out=shifted)
    np.bitwise_xor(out, shifted, out=out)
    return out


def exponentials(ids: WordArray, key: DrawKey) -> DoubleArray:
    """Return the exact random numbers E of some ids, (n,) float64; each depends on its own id and the key only."""
    shape = (2, len(ids))
    high, low = hash_ids(ids, key, np.empty(shape, np.uint32), np.empty(shape, np.uint32)).astype(np.float64)
    uniform = (high + (low + 0.5) * 2.0**-32) * 2.0**-32
    result: DoubleArray = -np.log1p(-np.minimum(uniform, _LARGEST))
    return result


def clamped(temperature: float) -> float:
    """Return the temperature within the range in which float32 logits can be divided by it."""
    return min(max(temperature, LEAST_TEMPERATURE), MOST_TEMPERATURE)


def weights(logits: FloatArray, temperature: float, largest: float, out: FloatArray | None = None) -> FloatArray:
    """Return exp((l - largest) / T) in float32, in `out` if it is an array; l may be -inf, the largest must not be."""
    with np.errstate(over="ignore", under="ignore"):  # of differences beyond float32, whose weight is 0
        out = np.subtract(logits, np.float32(largest), out=out)
        np.multiply(out, np.float32(1 / clamped(temperature)), out=out)
        np.exp(out, out=out)
    return out


class _Race(NamedTuple):
    """What the scores of all tokens of one draw have in common: the largest logit, the temperature and the key."""

    largest: float
    temperature: float
    key: DrawKey

    def scores(self, logits: FloatArray, words: WordArray) -> DoubleArray:
        """Return log(w / E) of tokens, by their logits and ids, (n,) float64."""
        scaled = (logits.astype(np.float64) - self.largest) / self.temperature
        result: DoubleArray = scaled - np.log(exponentials(words, self.key))
        return result

    def unlikely(self, best: float, n: int) -> np.float32:
        """Return the logit below which one of n tokens beats a score only with a hash of the SMALL_HASHES smallest."""
        return round_down(self.largest + self.temperature * (math.log(SMALL_HASHES / n * (1 - SLACK)) + best))


def draw(logits: FloatArray, ids: NDArray[np.intp] | None, temperature: float, key: DrawKey) -> int:
    """Draw a token id with probabilities in proportion to exp(l / T).

    Args:
        logits: (n,) logits of the tokens that may be drawn; -inf is never drawn, and not all may be -inf.
        ids: (n,) their ids, ascending; None if they are 0 to n - 1.
        temperature: T, above 0.
        key: The key of this draw.
    """
    n = len(logits)
    words = thread_scratch(n).ids[:n] if ids is None else ids.astype(np.uint32)
    race = _Race(float(logits.max()), clamped(temperature), key)
    if n <= FEW:
        return int(words[race.scores(logits, words).argmax()])
    top = int(logits.argmax())
    best, winner = float(race.scores(logits[top : top + 1], words[top : top + 1])[0]), int(words[top])
    is_flat = np.count_nonzero(logits >= race.unlikely(best, n)) > FEW
    for start, stop in pairwise([0, *range(FIRST_BLOCK if is_flat else BLOCK, n, BLOCK), n]):
        block, names = logits[start:stop], words[start:stop]
        rivals = _rivals(block, names, race, best, n)
        if len(rivals) > 0:
            scores = race.scores(block[rivals], names[rivals])
            place = int(scores.argmax())
            if scores[place] > best:
                best, winner = float(scores[place]), int(names[rivals[place]])
    return winner


def _rivals(logits: FloatArray, words: WordArray, race: _Race, best: float, n: int) -> NDArray[np.intp]:
    """Return the indices of the tokens of a block that may have a larger score than `best`.

    Args:
        logits: (m,) logits of the block.
        words: (m,) their ids.
        race: What the scores have in common.
        best: The largest score so far.
        n: Number of tokens of all blocks.
    """
    m, scratch = len(logits), thread_scratch(len(logits))
    hashes = hash_ids(words, race.key.of_h, scratch.hashes[:m], scratch.shifted[:m])
    possible = hashes <= np.uint32(SMALL_HASHES / n * 2.0**32)
    possible |= logits >= race.unlikely(best, n)
    rivals = np.flatnonzero(possible)
    if len(rivals) > FEW:
        rivals = rivals[_reaching(logits[rivals], words[rivals], hashes[rivals], race, best)]
    return rivals


def _reaching(logits: FloatArray, words: WordArray, hashes: WordArray, race: _Race, best: float) -> NDArray[np.intp]:
    """Return the indices of the tokens whose upper bound reaches `best`, and the score of the token of the largest."""
    bounds = np.maximum(hashes.astype(np.float32), _LEAST_HASH)
    np.divide(weights(logits, race.temperature, race.largest), bounds, out=bounds)
    top = slice(int(bounds.argmax()), int(bounds.argmax()) + 1)
    best = max(best, float(race.scores(logits[top], words[top])[0]))
    return np.flatnonzero(bounds >= np.float32(math.exp(best) * 2.0**-32 * (1 - SLACK)))


def round_down(value: float) -> np.float32:
    """Return the largest float32 that is at most `value`, so that float32 logits compare with it exactly."""
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
        below: np.float32 = np.nextafter(rounded, np.float32(-np.inf))
    return rounded if rounded <= value else below
