"""Builds TensorRT engines and adds them to bundles, for TensorRT and TensorRT-RTX."""

FOLDER = "engines"  # of a bundle
