"""Heads are trained on a frozen decoder, and judged."""
