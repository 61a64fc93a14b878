"""Trains heads on a frozen decoder, and evaluates them."""
