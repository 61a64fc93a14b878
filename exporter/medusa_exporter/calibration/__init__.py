"""Measures what the best tree depends on: the times of steps on this machine, and how well the heads predict."""
