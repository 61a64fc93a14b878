"""Runs Medusa bundles: numpy, tokenizers and one backend; never torch."""

from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.engine import Engine
from medusa_runtime.errors import BusyError, MedusaError
from medusa_runtime.generation import Generation

__all__ = ["Bundle", "BusyError", "Decoder", "Engine", "Generation", "MedusaError"]
