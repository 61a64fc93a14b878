"""Whether a build can come to anything: heads that fit the model, memory that suffices. Before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable

from medusa_exporter.families import FAMILIES
from medusa_exporter.heads.bases import other_base
from medusa_exporter.heads.chosen import check_heads
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.facts import parameters
from medusa_exporter.loading.room import check_room
from medusa_exporter.models import ModelSource, check_family, read_sizes

# A build's peak of anonymous memory over what a process that has imported every library holds: see
# benchmarks/build_memory.py. It grows with the weights and, from the trace, a little with the layers.
PEAK = 1.15  # times the weights in fp32
BESIDES = 150 * 10**6  # bytes


def check_fit(source: ModelSource, heads: str, report: Callable[[str], None]) -> None:
    """Check `heads` against the model of `source`, and both against the memory that is left.

    Raises HeadsError and UnsupportedModelError for heads and models that do not fit each other, CapacityError, with the
    figures, where memory does not suffice. Heads that name another base model are reported.
    """
    sizes = read_sizes(source)
    facts = check_heads(heads, sizes.hidden_size, sizes.vocab_size, sizes.layers)
    family = FAMILIES[check_family(source)]
    if facts.taps and not family.taps:
        raise HeadsError(
            f"{heads}: heads with taps, but the layers of {family.name} read their input without a norm; "
            "give heads without taps for this model"
        )
    weights = 4 * (sizes.parameters + parameters(facts))
    check_room(
        needed(weights), f"{source.gguf or source.location}: building it ({weights // 10**6:,} MB of fp32 weights)"
    )
    if other := other_base(heads, source.names):
        report(f"warning: {other}")


def needed(weights: int) -> int:
    """The bytes that a build of so many bytes of fp32 weights takes at its peak."""
    return round(weights * PEAK) + BESIDES
