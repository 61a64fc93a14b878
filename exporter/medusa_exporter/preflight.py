"""Checks before a build loads anything: that the heads, if any, fit the model, and that memory suffices."""

from __future__ import annotations

from collections.abc import Callable

from medusa_exporter.families import FAMILIES
from medusa_exporter.heads.architecture import HeadArchitecture, parameter_count
from medusa_exporter.heads.base_model import base_model_mismatch
from medusa_exporter.heads.compatibility import check_heads
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.loading.memory import check_memory
from medusa_exporter.loading.sizes import DecoderSizes
from medusa_exporter.models import ModelSource, check_family, read_sizes

# The peak of a build's anonymous memory above that of a process that has imported torch and transformers; each value is
# a little more than benchmarks/build_memory.py measured for models of 0.35 to 3 GB.
PEAK = 1.02  # times the weights in fp32
TRACE_PER_LAYER = 5 * 10**6  # bytes that tracing a layer takes
OVERHEAD = 150 * 10**6  # bytes, whatever the model


def check_build(source: ModelSource, heads: str | None, report: Callable[[str], None]) -> None:
    """Check that `heads` fit the model, and that both fit into the memory that is available.

    Args:
        source: The decoder.
        heads: Folder or hub name of the heads; None for a bundle without heads.
        report: Called with a warning if the heads name another base model.

    Raises:
        HeadsError: If the heads do not fit the model.
        UnsupportedModelError: If the model is not supported.
        CapacityError: If memory does not suffice; the message has both sizes.
    """
    sizes = read_sizes(source)
    facts = None if heads is None else check_heads(heads, sizes.hidden_size, sizes.vocab_size, sizes.layers)
    family = FAMILIES[check_family(source)]
    if facts is not None and facts.taps and not family.taps:
        raise HeadsError(
            f"{heads}: heads with taps, but the layers of {family.name} read their input without a norm; "
            "give heads without taps for this model"
        )
    weights = weight_bytes(sizes, facts) // 10**6
    check_memory(memory_needed(sizes, facts), f"{source.described}: building it ({weights:,} MB of fp32 weights)")
    if heads is not None and (other := base_model_mismatch(heads, source.names)):
        report(f"warning: {other}")


def weight_bytes(sizes: DecoderSizes, facts: HeadArchitecture | None) -> int:
    """Return the bytes of all weights in fp32, those of the heads included."""
    return 4 * (sizes.parameters + (0 if facts is None else parameter_count(facts)))


def memory_needed(sizes: DecoderSizes, facts: HeadArchitecture | None) -> int:
    """Return the peak of a build in bytes: the weights, and a copy of the largest one or the memory of the trace."""
    return round(weight_bytes(sizes, facts) * PEAK) + max(4 * sizes.largest, sizes.layers * TRACE_PER_LAYER) + OVERHEAD
