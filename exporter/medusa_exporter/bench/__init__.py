"""Measures tree decoding beside plain decoding, on several backends in turns, each in a process of its own."""
