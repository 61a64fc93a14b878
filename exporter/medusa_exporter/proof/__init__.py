"""Proof of a build: every graph is run next to the model that it was made from before a bundle appears."""

from medusa_exporter.proof.prove import Proof, prove
from medusa_exporter.proof.reference import record, window_out_of_reach

__all__ = ["Proof", "prove", "record", "window_out_of_reach"]
