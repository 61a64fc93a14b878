"""Measures tree decoding and plain decoding on several backends, alternating between them prompt by prompt."""
