"""Validation of a build: every graph is compared with the PyTorch model before the bundle appears."""

from medusa_exporter.validation.reference import record_reference, unvalidated_window
from medusa_exporter.validation.validate import GroundTruth, validate_graphs

__all__ = ["GroundTruth", "validate_graphs", "record_reference", "unvalidated_window"]
