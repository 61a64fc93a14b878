"""How long a step of an engine takes, on the GPU that has built it: what a runtime chooses between engines by."""

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

WARM, RUNS = 5, 20  # steps: the first is a plain one, the second is captured, all others replay that


def step_ms(facts: EngineManifest, engine: Path, model: ModelFacts, heads: HeadFacts, device: Any) -> float:
    """Return the median of RUNS steps, in milliseconds, behind as many rows as the engine is tuned for.

    device: a `medusa_runtime.backends.cuda.CudaDevice`. Raises CapacityError where the engine does not fit its memory.
    """
    B, T, rows = facts.batch, facts.nodes, facts.best
    enough = replace(model, context=rows)  # no memory for more, of which an engine may take much
    backend = TensorRtBackend([(facts, engine)], enough, heads, device, name=facts.flavour)
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
