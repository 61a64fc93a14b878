"""Whether a build can come to anything: heads that fit the model, memory that suffices. Before anything is loaded."""

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

# A build's peak of anonymous memory over what a process with torch and transformers imported holds; each a little more
# than benchmarks/build_memory.py measured of models of 0.35 to 3 GB.
PEAK = 1.02  # times the weights in fp32
OF_A_LAYER = 5 * 10**6  # bytes that tracing a layer takes
BESIDES = 150 * 10**6  # bytes


def check_build(source: ModelSource, heads: str, report: Callable[[str], None]) -> None:
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
    weights = 4 * (sizes.parameters + parameter_count(facts)) // 10**6
    check_memory(
        needed(sizes, facts), f"{source.gguf or source.location}: building it ({weights:,} MB of fp32 weights)"
    )
    if other := base_model_mismatch(heads, source.names):
        report(f"warning: {other}")


def needed(sizes: DecoderSizes, facts: HeadArchitecture) -> int:
    """The bytes that a build takes at its peak: the weights, and a copy of the largest one or what a trace takes."""
    weights = 4 * (sizes.parameters + parameter_count(facts))
    return round(weights * PEAK) + max(4 * sizes.largest, sizes.layers * OF_A_LAYER) + BESIDES
