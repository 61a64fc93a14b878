"""Medusa heads: what they compute, how they are stored, trained and judged."""
