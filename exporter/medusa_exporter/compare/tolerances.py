"""How far two backends may be apart, by precision.

Measured on SmolLM2-135M-Instruct, `verify`'s prompts, 8 steps each, trees of 8 and 64 nodes, beside fp32 on a CPU; the
largest of all tensors, which always was one layer's values (of logits and hidden states about a half of it):

| | error | gap | candidates lacking |
| --- | --- | --- | --- |
| fp32, the graph of ort-cuda | 5e-6 | 0 | 0.05 (its heads have all bits, the CPU's 8) |
| fp16, the graph of ort-cuda | 5e-3 | 2e-4 | 0.04 |
| int8 | 0.24 | 0.05 | 0.09 |
| w8a8 | 0.34 | 0.08 | 0.13 |
| int4 | 1.13 | 0.41 | 0.34 |

A mask, positions or committed rows that are wrong were errors of 0.9 to 1.8 there: int4 beside other weights can hide
them. A backend that is in doubt is best compared in one precision, where limits are tight.
"""

from __future__ import annotations

from dataclasses import dataclass

from medusa_runtime.errors import MedusaError


@dataclass(frozen=True)
class Tolerance:
    """Limits of what may differ.

    error: of any element of a tensor, as a share of the largest magnitude in the reference's. gap: between the two
    sides' likeliest tokens where they are not the same, as a share of the logits' largest magnitude. candidates: the
    least share of the reference's candidates, head by head and whatever their rank, that the other has too.
    """

    error: float
    gap: float
    candidates: float


# Sides with the same weights add up in another order, which costs 5e-6, and in fewer bits round the sums otherwise.
# fp32: twenty times what was measured, for other libraries' kernels. fp16: four times. bf16 keeps three bits less than
# fp16: eight times its limits. Quantised graphs gave the same bits with one thread and with two; on a processor with
# other instructions some activations are rounded the other way, by 1/127 of their row each (a limit not measured).
SAME_WEIGHTS = {
    "fp32": Tolerance(1e-4, 1e-4, 0.9),
    "fp16": Tolerance(0.02, 0.02, 0.9),
    "bf16": Tolerance(0.16, 0.16, 0.9),
    "int8": Tolerance(0.05, 0.05, 0.9),
    "w8a8": Tolerance(0.05, 0.05, 0.9),
    "int4": Tolerance(0.05, 0.05, 0.9),
}
# Weights of one side that were quantised, or otherwise than the other's, cost what the table above shows.
DIFFERENT_WEIGHTS = {
    "int8": Tolerance(0.4, 0.15, 0.8),
    "w8a8": Tolerance(0.6, 0.2, 0.75),
    "int4": Tolerance(2.0, 0.8, 0.5),
}


def tolerance(reference: str, other: str) -> Tolerance:
    """Return what holds between two precisions: the widest limits of both. MedusaError for one that is unknown."""
    for precision in (reference, other):
        if precision not in SAME_WEIGHTS:
            raise MedusaError(
                f"no tolerance for precision {precision!r:.80}; expected one of {', '.join(SAME_WEIGHTS)}"
            )
    if reference == other:
        return SAME_WEIGHTS[reference]
    both = [DIFFERENT_WEIGHTS.get(precision, SAME_WEIGHTS[precision]) for precision in (reference, other)]
    return Tolerance(max(one.error for one in both), max(one.gap for one in both), min(one.candidates for one in both))
