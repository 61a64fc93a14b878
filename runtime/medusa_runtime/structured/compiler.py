"""Compiles structured outputs for one tokenizer, and keeps those that were used last."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from medusa_runtime.errors import ArgumentError
from medusa_runtime.facts import ModelFacts
from medusa_runtime.structured.adapter import adapt_tokenizer
from medusa_runtime.structured.answer_grammar import AnswerGrammar
from medusa_runtime.structured.habits import Habits
from medusa_runtime.structured.library import call_with_large_stack, import_llguidance, refused, shortened
from medusa_runtime.structured.outputs import StructuredOutputs
from medusa_runtime.structured.schema_limits import check_grammar, check_schema
from medusa_runtime.tokenizer import Tokenizer

MAX_COMPILED = 64  # that an engine keeps, of some hundred kilobytes to ten megabytes each
_EXPECTED = {
    "json": "a JSON schema that some document matches, of keywords and patterns that llguidance supports, without "
    "references to other documents: leave out what is named",
    "json_object": "another tokenizer",
    "regex": "a regular expression in the syntax of Rust's crate regex, without look-around and back-references",
    "choice": "texts that the tokenizer can write",
    "grammar": "a grammar in llguidance's variant of Lark's syntax, with the rule start",
}


class Grammar:
    """Structured outputs, compiled: where each answer begins.

    Args:
        matcher: A matcher of llguidance in its initial state, which stays in it.
        tokenizer: The tokenizer, as llguidance reads it.
        model: The model.
    """

    def __init__(self, matcher: Any, tokenizer: Any, model: ModelFacts) -> None:
        self._matcher, self._habits, self._model = matcher, Habits(tokenizer), model

    def begin(self) -> AnswerGrammar:
        """Return what follows one answer; all of them are used in the same thread."""
        return AnswerGrammar(self._matcher, self._habits, self._model.vocab_size, self._model.eos_token_ids)


class GrammarCompiler:
    """Compiles structured outputs; several threads may use it.

    Args:
        tokenizer: The tokenizer of the model.
        model: The model.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelFacts) -> None:
        self._tokenizer, self._model = tokenizer, model
        self._lock = threading.Lock()
        self._adapter: Any = None  # the tokenizer as llguidance reads it
        self._compiled: OrderedDict[StructuredOutputs, Grammar] = OrderedDict()  # the one used last is the last

    def compile(self, outputs: StructuredOutputs) -> Grammar:
        """Return compiled structured outputs.

        Raises:
            ArgumentError: llguidance refuses them or the tokenizer, or the model has no end token.
            MissingExtraError: llguidance is not installed.
            CapacityError: Memory does not suffice.
        """
        with self._lock:
            found = self._compiled.get(outputs)
            if found is not None:
                self._compiled.move_to_end(outputs)
                return found
        library = import_llguidance()
        with self._lock:
            if self._adapter is None:
                self._adapter = adapt_tokenizer(library, self._tokenizer, self._model)
        matcher = call_with_large_stack(lambda: self._match(library, outputs))
        found = Grammar(matcher, self._adapter, self._model)
        with self._lock:
            self._compiled[outputs] = found
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return found

    def _match(self, library: Any, outputs: StructuredOutputs) -> Any:
        if outputs.json is not None:
            check_schema(str(outputs.json))
        if outputs.grammar is not None:
            check_grammar(outputs.grammar)
        what, expected = f"{outputs.kind} of structured_outputs cannot be compiled", _EXPECTED[outputs.kind]
        with refused(what, expected):
            matcher = library.LLMatcher(self._adapter, _grammar(library.LLMatcher, outputs), log_level=0)
        if matcher.is_error():
            raise ArgumentError(f"{what}: {shortened(matcher.get_error())}; expected {expected}")
        if outputs.grammar is not None and not _can_go_back(matcher):
            raise ArgumentError(
                f"{what}: it has a rule with stop= or max_tokens=, which depends on how a text is divided into tokens; "
                "expected none: end the rule with suffix=, or bound its regular expression"
            )
        return matcher


def _can_go_back(matcher: Any) -> bool:
    """Return whether tokens can be taken back, as they are where a step tries more than it keeps."""
    copy = matcher.deep_copy()
    allowed = np.unpackbits(np.frombuffer(copy.compute_bitmask(), dtype=np.uint8), bitorder="little").nonzero()[0]
    if copy.is_error() or not len(allowed) or copy.try_consume_tokens([int(allowed[0])]) != 1:
        return True  # nothing can be written; that is found out when an answer is
    return bool(copy.rollback(1))


def _grammar(matcher: Any, outputs: StructuredOutputs) -> str:
    """Return the structured outputs in llguidance's own form."""
    if outputs.regex is not None:
        return str(matcher.grammar_from_regex(outputs.regex))
    if outputs.grammar is not None:
        return str(matcher.grammar_from_lark(outputs.grammar))
    if outputs.choice is not None:
        alternatives = " | ".join(json.dumps(one) for one in outputs.choice)
        return str(matcher.grammar_from_lark(f"start: {alternatives}"))
    schema = '{"type": "object"}' if outputs.json is None else outputs.json
    options = {"whitespace_flexible": not outputs.disable_any_whitespace, "lenient": False}  # whatever the default
    return str(matcher.grammar_from_json_schema(schema, overrides=options))
