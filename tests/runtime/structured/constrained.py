"""Plain constrained decoding of the toy model, spelt out: a new matcher for every token, nothing rolled back."""

import dataclasses
import json

import llguidance
import numpy as np
from medusa_runtime.sampling.sampler import Sampler
from medusa_runtime.structured.outputs import StructuredOutputs

from ..fake_backend import logits_of, state_of
from .schemas import json_tokenizer, vocabulary_size

VOCAB = vocabulary_size()
END = VOCAB - 1


class Rows:
    """The row of the toy model behind some tokens."""

    def __init__(self, tokens):
        self._logits = logits_of(state_of(tokens), VOCAB)

    def __call__(self, row):
        return self._logits

    def summary(self, row):
        return None


def grammar_of(outputs):
    if outputs.json is not None:
        options = {"whitespace_flexible": not outputs.disable_any_whitespace}
        return llguidance.LLMatcher.grammar_from_json_schema(json.loads(outputs.json), overrides=options)
    if outputs.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(outputs.regex)
    if outputs.choice is not None:
        return llguidance.grammar_from("choice", json.dumps(outputs.choice))
    if outputs.grammar is not None:
        return llguidance.LLMatcher.grammar_from_lark(outputs.grammar)
    options = {"whitespace_flexible": not outputs.disable_any_whitespace}
    return llguidance.LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=options)


def adapter():
    return llguidance.LLTokenizer(json_tokenizer().core.to_str(), n_vocab=VOCAB, eos_token=[END])


def allowed_behind(outputs, output, tokenizer=None):
    """The ids that a new matcher allows behind `output`, ascending."""
    matcher = llguidance.LLMatcher(tokenizer or adapter(), grammar_of(outputs), log_level=0)
    assert matcher.consume_tokens(list(output)), matcher.get_error()
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(bits, count=VOCAB, bitorder="little")).tolist()


def constrained_tokens(prompt, params, choice=0):
    """The tokens of an answer: each is chosen from those that are allowed, as `allowed_token_ids`."""
    outputs, tokenizer = StructuredOutputs.of_optional(params.structured_outputs), adapter()
    tokens, seed = list(prompt), params.seed or 0
    while len(tokens) - len(prompt) < params.max_tokens:
        answer = tokens[len(prompt) :]
        allowed = set(allowed_behind(outputs, answer, tokenizer)) & set(params.allowed_token_ids or range(VOCAB))
        step = dataclasses.replace(params, structured_outputs=None, allowed_token_ids=sorted(allowed))
        sampler = Sampler(step, prompt, VOCAB, {END, *params.stop_token_ids}, (), seed, choice)
        tokens.append(sampler.choose(Rows(tokens), 0, answer))
        if tokens[-1] in {END, *params.stop_token_ids}:
            return tokens[len(prompt) :], "stop"
    return tokens[len(prompt) :], "length"
