"""Runs Medusa bundles: numpy, tokenizers and one backend; never torch."""
