"""Runs Medusa bundles: text generation with tree speculative decoding, without torch.

Start with `Engine.load`, which checks and loads a bundle, and `Engine.generate`, which returns or streams an answer
(`Generation`). To work with token ids, open a `Bundle`, load a backend with `load_backend` and create a `Decoder`; its
`SequenceState` holds the answer in progress. Every error derives from `MedusaError` (`medusa_runtime.errors`).
"""

from medusa_runtime.backends import load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.engine import Engine
from medusa_runtime.errors import BusyError, MedusaError
from medusa_runtime.generation import Generation
from medusa_runtime.sequence import SequenceState

__all__ = ["Bundle", "BusyError", "Decoder", "Engine", "Generation", "MedusaError", "SequenceState", "load_backend"]
