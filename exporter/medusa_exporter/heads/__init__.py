"""Medusa heads: the module that computes them, and reading, checking, converting and saving their files."""
