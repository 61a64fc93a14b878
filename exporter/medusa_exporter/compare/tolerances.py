"""How far the outputs of two backends may differ, by precision.

Measured on SmolLM2-135M-Instruct with `verify`'s prompts, 8 steps for each prompt, trees of 8 and 64 nodes, against
fp32 on a CPU. The table has the largest error of all tensors, which was always in one layer's values; logits and hidden
states had about half of it:

| | error | logit gap | missing candidates |
| --- | --- | --- | --- |
| fp32, the graph of ort-cuda | 5e-6 | 0 | 0.05 (its heads are in fp32, those of the CPU graph in 8 bits) |
| fp16, the graph of ort-cuda | 5e-3 | 2e-4 | 0.04 |
| int8 | 0.24 | 0.05 | 0.09 |
| w8a8 | 0.34 | 0.08 | 0.13 |
| int4 | 1.13 | 0.41 | 0.34 |

A wrong mask, wrong positions or wrongly committed rows caused errors of 0.9 to 1.8 in this setting, which the limits of
int4 against other weights can hide. Check a backend in one precision, where the limits are tight.
"""

from __future__ import annotations

from dataclasses import dataclass

from medusa_runtime.errors import MedusaError


@dataclass(frozen=True)
class Tolerance:
    """Limits for the differences between two backends.

    Attributes:
        error: Largest error of any element, as a share of the largest magnitude in the reference's tensor.
        gap: Largest logit gap between the two sides' most likely tokens where these differ, as a share of the logits'
            largest magnitude.
        candidates: Smallest share of the reference's candidates, head by head and in any order, that the other side
            must have too.
    """

    error: float
    gap: float
    candidates: float


# With the same weights, sums in another order cost 5e-6, and fewer bits cost their rounding. fp32: twenty times the
# measured error, for the kernels of other libraries. fp16: four times. bf16 has three bits less than fp16: eight times
# its limits. Quantised graphs gave identical results with one thread and with two; on a processor with other
# instructions some activations are rounded the other way, by 1/127 of their row each (this limit was not measured).
SAME_WEIGHTS = {
    "fp32": Tolerance(1e-4, 1e-4, 0.9),
    "fp16": Tolerance(0.02, 0.02, 0.9),
    "bf16": Tolerance(0.16, 0.16, 0.9),
    "int8": Tolerance(0.05, 0.05, 0.9),
    "w8a8": Tolerance(0.05, 0.05, 0.9),
    "int4": Tolerance(0.05, 0.05, 0.9),
}
# Where one side's weights are quantised, or the two sides' are quantised differently: the errors of the table above.
DIFFERENT_WEIGHTS = {
    "int8": Tolerance(0.4, 0.15, 0.8),
    "w8a8": Tolerance(0.6, 0.2, 0.75),
    "int4": Tolerance(2.0, 0.8, 0.5),
}


def tolerance(reference: str, other: str) -> Tolerance:
    """Return the limits between two precisions: for each limit the wider one of the two.

    Raises:
        MedusaError: A precision has no tolerance.
    """
    for precision in (reference, other):
        if precision not in SAME_WEIGHTS:
            raise MedusaError(
                f"no tolerance for precision {precision!r:.80}; expected one of {', '.join(SAME_WEIGHTS)}: compare "
                "graphs in these precisions"
            )
    if reference == other:
        return SAME_WEIGHTS[reference]
    both = [DIFFERENT_WEIGHTS.get(precision, SAME_WEIGHTS[precision]) for precision in (reference, other)]
    return Tolerance(max(one.error for one in both), max(one.gap for one in both), min(one.candidates for one in both))
