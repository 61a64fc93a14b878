"""Chi-squared tests without scipy."""

import numpy as np

SIGNIFICANCE = 1e-6  # how often a correct sampler would fail one of these tests, if its seeds were not fixed
DEVIATIONS = 4.7534  # of the normal distribution, one-sided, at that significance


def critical(degrees):
    """The value that chi-squared exceeds with that probability (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + DEVIATIONS * spread**0.5) ** 3


def assert_distribution(counts, probabilities):
    """Assert that counts come from these probabilities; cells with fewer than 5 expected counts are joined."""
    counts, probabilities = np.asarray(counts, dtype=float).ravel(), np.asarray(probabilities, dtype=float).ravel()
    assert abs(probabilities.sum() - 1) < 1e-9
    assert counts[probabilities == 0].sum() == 0, "a token of probability 0 was drawn"
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert len(counts) > 1, "a test of one cell cannot fail"
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < critical(len(counts) - 1), f"{statistic:.1f} with {len(counts) - 1} degrees of freedom"
