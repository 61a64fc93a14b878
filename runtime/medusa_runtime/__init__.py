"""Runs Medusa bundles: text generation with tree speculative decoding, without torch.

Start with `Engine.load`, which checks and loads a bundle. `Engine.generate` answers a prompt with `SamplingParams` and
returns a `GenerationResult`; `Engine.submit` returns a `RequestHandle` to read the answer while it is generated;
`AsyncEngine` does the same for asyncio. To work with single steps, open a `Bundle`, load a backend with `load_backend`
and create a `Decoder`; its `SequenceState` holds the answer in progress. Every error derives from `MedusaError`
(`medusa_runtime.errors`).
"""

from medusa_runtime.accept import Typical
from medusa_runtime.async_engine import AsyncEngine
from medusa_runtime.backends import load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.engine import Engine
from medusa_runtime.errors import BusyError, MedusaError
from medusa_runtime.handle import RequestHandle
from medusa_runtime.results import Chunk, GenerationResult
from medusa_runtime.sampling_params import SamplingParams
from medusa_runtime.sequence import SequenceState
from medusa_runtime.stats import Stats

__all__ = [
    "AsyncEngine",
    "Bundle",
    "BusyError",
    "Chunk",
    "Decoder",
    "Engine",
    "GenerationResult",
    "MedusaError",
    "RequestHandle",
    "SamplingParams",
    "SequenceState",
    "Stats",
    "Typical",
    "load_backend",
]
