"""Structured outputs: answers that match a JSON schema, a regular expression, a list of choices or a grammar.

`StructuredOutputs` states what an answer has to match, `GrammarCompiler` compiles it for a bundle's tokenizer with
llguidance, and `AnswerGrammar` follows one answer: which tokens may come next, and which ones must.
"""

from medusa_runtime.structured.outputs import StructuredOutputs

__all__ = ["StructuredOutputs"]
