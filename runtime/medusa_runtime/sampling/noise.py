"""The draw of a token: an exponential race whose noise depends on (seed, answer, position, token id) only.

Token i has the weight w_i = exp(l_i / T) and a random number E_i of the exponential distribution with mean 1; the token
with the largest w_i / E_i wins, which happens with probability w_i / Σ w (the Gumbel-max method, as -log E_i is a
Gumbel variable). Since E_i is a function of the position and the token's id, the winner does not depend on the order
of the tokens, on a normaliser, or on how many tokens a step verifies: only logits that change by more than the gap
between the two best scores change it.

Cost: E = -log(1 - v) with v = (h + f) / 2**32, where h is a hash of 32 bits and f, from 0 to 1, another one. As E ≥ v ≥
h / 2**32, the quotient w · 2**32 / h is an upper bound of the score. It is computed in float32 for all tokens; only the
few whose bound reaches the best exact score are then evaluated exactly, with f, in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import FloatArray
from medusa_runtime.sampling.scratch import Scratch, thread_scratch

WordArray = NDArray[np.uint32]
DoubleArray = NDArray[np.float64]

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-30, 1e30  # beyond, scaled float32 logits are 0 or infinite; no model sees it
SLACK = 1e-3  # relative error of the bounds, which float32 keeps below 1e-4
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # the increment of splitmix64
_LEAST_HASH = np.float32(2.0**-33)  # f is at least 2**-33, so that h + f is never 0
_LARGEST = 1.0 - 2.0**-53  # the largest float64 below 1


class DrawKey(NamedTuple):
    """The key of one draw: four random words, two for each of the hashes."""

    high: tuple[int, int]
    low: tuple[int, int]


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
    first, second = _mix(state ^ 1), _mix(state ^ 2)
    return DrawKey((first >> 32, first & 0xFFFFFFFF), (second >> 32, second & 0xFFFFFFFF))


def _mix(state: int) -> int:
    """One step of splitmix64 (Steele, Lea and Flood, 2014): 64 bits to 64 well mixed bits, one to one."""
    state = (state + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def hash_ids(ids: WordArray, key: tuple[int, int], out: WordArray, shifted: WordArray) -> WordArray:
    """Write a 32-bit hash of each id into `out`: two rounds of shift, xor and multiply, keyed before each of them.

    Args:
        ids: (n,) token ids.
        key: Two words of 32 bits.
        out: (n,) for the hashes.
        shifted: (n,) for intermediate values.

    Returns:
        `out`.
    """
    np.add(ids, np.uint32(key[0]), out=out)
    for shift, factor, word in ((16, 0x7FEB352D, key[1]), (15, 0x846CA68B, None)):
        np.right_shift(out, np.uint32(shift), out=shifted)
        np.bitwise_xor(out, shifted, out=out)
        np.multiply(out, np.uint32(factor), out=out)
        if word is not None:
            np.bitwise_xor(out, np.uint32(word), out=out)
    np.right_shift(out, np.uint32(16), out=shifted)
    np.bitwise_xor(out, shifted, out=out)
    return out


def exponentials(ids: WordArray, key: DrawKey) -> DoubleArray:
    """Return the exact random numbers E of some ids, (n,) float64; each depends on its own id and the key only."""
    high = hash_ids(ids, key.high, np.empty_like(ids), np.empty_like(ids)).astype(np.float64)
    low = hash_ids(ids, key.low, np.empty_like(ids), np.empty_like(ids)).astype(np.float64)
    uniform = (high + (low + 0.5) * 2.0**-32) * 2.0**-32
    result: DoubleArray = -np.log1p(-np.minimum(uniform, _LARGEST))
    return result


def clamped(temperature: float) -> float:
    """Return the temperature within the range in which float32 logits can be divided by it."""
    return min(max(temperature, LEAST_TEMPERATURE), MOST_TEMPERATURE)


def weights(logits: FloatArray, temperature: float, out: FloatArray) -> FloatArray:
    """Write exp((l - max l) / T) into `out`, in float32; l may be -inf, the largest must not be.

    Returns:
        `out`.
    """
    with np.errstate(over="ignore"):  # of differences beyond float32, whose weight is 0
        np.subtract(logits, logits.max(), out=out)
        np.multiply(out, np.float32(1 / clamped(temperature)), out=out)
        np.exp(out, out=out)
    return out


def draw(logits: FloatArray, ids: NDArray[np.intp] | None, temperature: float, key: DrawKey) -> int:
    """Draw a token id with probabilities in proportion to exp(l / T).

    Args:
        logits: (n,) logits of the tokens that may be drawn; -inf is never drawn, and not all may be -inf.
        ids: (n,) their ids, ascending; None if they are 0 to n - 1.
        temperature: T, above 0.
        key: The key of this draw.
    """
    n = len(logits)
    scratch = thread_scratch(n)
    words = scratch.ids[:n] if ids is None else ids.astype(np.uint32)
    bounds = _bounds(logits, words, temperature, key, scratch)
    first = bounds.argmax()
    scores = _scores(logits, words, np.array([first]), temperature, key)
    reached = np.float32(np.exp(scores[0]) * 2.0**-32 * (1 - SLACK))
    rivals = np.flatnonzero(bounds >= reached)
    if len(rivals) > 1:
        first = rivals[_scores(logits, words, rivals, temperature, key).argmax()]
    return int(words[first])


def _bounds(logits: FloatArray, words: WordArray, temperature: float, key: DrawKey, scratch: Scratch) -> FloatArray:
    """Return upper bounds of w / E, in units of 2**32, (n,): valid but for a relative error below SLACK."""
    n = len(logits)
    hashes = hash_ids(words, key.high, scratch.hashes[:n], scratch.shifted[:n])
    bounds = scratch.bounds[:n]
    np.copyto(bounds, hashes, casting="unsafe")
    np.maximum(bounds, _LEAST_HASH, out=bounds)
    with np.errstate(under="ignore"):
        np.divide(weights(logits, temperature, scratch.weights[:n]), bounds, out=bounds)
    return bounds


def _scores(
    logits: FloatArray, words: WordArray, chosen: NDArray[np.intp], temperature: float, key: DrawKey
) -> DoubleArray:
    """Return log(w / E) of the chosen tokens, exact, (len(chosen),) float64."""
    scaled = (logits[chosen].astype(np.float64) - float(logits.max())) / clamped(temperature)
    result: DoubleArray = scaled - np.log(exponentials(words[chosen], key))
    return result
