"""The acceptance rule of one answer, and the tokens that end it, from the parameters of its request."""

from __future__ import annotations

from collections.abc import Sequence

from medusa_runtime.accept import Acceptance, AcceptRule, TokenTree, Typical, greedy, walk
from medusa_runtime.errors import InvalidLogitsError, RequestError
from medusa_runtime.facts import ModelFacts
from medusa_runtime.request import Request
from medusa_runtime.rows import RowReader
from medusa_runtime.sampling.sampler import Sampler
from medusa_runtime.sampling_params import SamplingParams
from medusa_runtime.structured.answer_grammar import AnswerGrammar

_NONE = -1  # no token


class SampleRule:
    """Accepts the path on which every token is the one that plain decoding would draw; lossless.

    At each node the next token is drawn from the target distribution; the walk goes on to the nodes that hold it.

    Args:
        sampler: Draws the tokens of one answer.
        answer: The answer's tokens so far, a list that grows.
    """

    def __init__(self, sampler: Sampler, answer: Sequence[int]) -> None:
        self._sampler, self._answer = sampler, answer

    def __call__(
        self,
        tree: TokenTree,
        tokens: Sequence[int],
        argmax: Sequence[int],  # noqa: ARG002
        rows: RowReader,
        /,
    ) -> Acceptance:
        """Accept a path of one tree; arguments and result are those of `medusa_runtime.accept.greedy`."""
        output = list(self._answer)
        first = len(output)

        def draw(node: int) -> int:
            try:
                token = self._sampler.choose(rows, node, output)
            except (InvalidLogitsError, RequestError):
                if len(output) == first:
                    raise
                return _NONE  # the answer may end before: if not, this is the first node of the next step
            output.append(token)
            return token

        path, token = walk(tree, tokens, draw)
        return (path, token) if token != _NONE else (path[:-1], tokens[path[-1]])


def end_ids(params: SamplingParams, model: ModelFacts) -> frozenset[int]:
    """Return the model's own end tokens that end an answer."""
    return frozenset(() if params.ignore_eos else model.eos_token_ids)


def stop_ids(params: SamplingParams, model: ModelFacts) -> frozenset[int]:
    """Return all tokens that end an answer."""
    return end_ids(params, model) | frozenset(params.stop_token_ids)


def answer_rule(
    request: Request, index: int, model: ModelFacts, answer: Sequence[int], grammar: AnswerGrammar | None = None
) -> AcceptRule:
    """Return the acceptance rule of one answer.

    Args:
        request: The request.
        index: Number of the answer among the request's.
        model: The model.
        answer: The answer's tokens so far, a list that grows.
        grammar: Follows the answer through what it has to match; None if it may be anything.

    Raises:
        ArgumentError: The parameters forbid every token, or name one outside the vocabulary.
    """
    params = request.params
    if isinstance(params.acceptance, Typical):
        return params.acceptance
    if params.is_greedy and not params.has_processors:
        return greedy
    ends = {*model.eos_token_ids, *params.stop_token_ids}  # what min_tokens forbids, as in vLLM with ignore_eos too
    sampler = Sampler(params, request.prompt, model.vocab_size, ends, request.bad_words, request.seed, index, grammar)
    return SampleRule(sampler, answer)
