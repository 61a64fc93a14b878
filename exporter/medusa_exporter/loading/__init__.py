"""Checks of a model before and while it is loaded: config, sizes, RoPE, weights, end tokens and chat templates."""
