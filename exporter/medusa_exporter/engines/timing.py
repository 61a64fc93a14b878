"""Measures how long a step of an engine takes on the GPU that built it, by which the runtime chooses an engine."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from medusa_runtime.backends.base import Step
from medusa_runtime.backends.tensorrt import TensorRtBackend
from medusa_runtime.engine_manifest import EngineManifest
from medusa_runtime.facts import HeadFacts, ModelFacts

WARM, RUNS = 5, 20  # steps: the first runs as it is, the second is captured as a CUDA graph, the others replay it


def step_ms(facts: EngineManifest, engine: Path, model: ModelFacts, heads: HeadFacts, device: Any) -> float:
    """Return the median time of RUNS steps, in milliseconds, after as many rows as the engine is optimised for.

    Args:
        facts: Facts about the engine.
        engine: The engine file.
        model: Facts about the decoder.
        heads: Facts about the heads.
        device: A `medusa_runtime.backends.cuda.CudaDevice`.

    Raises:
        CapacityError: If the engine does not fit into the GPU's memory.
    """
    B, T, rows = facts.batch, facts.nodes, facts.best
    model = replace(model, context=rows)  # allocates no memory for more rows than are used
    backend = TensorRtBackend([(facts, engine)], model, heads, device, name=facts.flavour)
    backend.allocate(B, rows)
    step = Step(
        input_ids=np.zeros((B, T), np.int32),
        position_ids=np.full((B, T), rows - 1, np.int32),
        tree_mask=np.repeat(np.tri(T, dtype=np.bool_)[None], B, axis=0),
        past_length=np.full(B, rows, np.int32),
        logit_rows=np.zeros((B, facts.rows), np.int32),
        draft=facts.draft,
    )
    seconds = []
    for _ in range(WARM + RUNS):
        backend.run(step)
        seconds.append(backend.run_seconds)
    return 1e3 * statistics.median(seconds[WARM:])
