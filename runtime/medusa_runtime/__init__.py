"""Runs Medusa bundles: numpy, tokenizers and one backend; never torch."""

from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.engine import Engine, Generation
from medusa_runtime.errors import MedusaError

__all__ = ["Bundle", "Decoder", "Engine", "Generation", "MedusaError"]
