"""Compares the output tensors of two backends, step by step, on the same inputs."""
