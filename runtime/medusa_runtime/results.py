"""What a request returns: chunks while it is generated, and the whole result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Logprob(NamedTuple):
    """A token and its natural log-probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probabilities at one position of an answer: the model's own, before temperature and processors.

    Args:
        token_id: The token that was chosen.
        logprob: Its log-probability.
        top: The most likely tokens, the most likely first; as many as the request asked for.
    """

    token_id: int
    logprob: float
    top: tuple[Logprob, ...]


@dataclass(frozen=True)
class Chunk:
    """What one step added to one answer.

    Args:
        index: Number of the answer among the request's `n`, from 0.
        text: New text: never part of a character, and never taken back. It may be empty while it may still become
            part of a stop string.
        token_ids: New tokens; the last ones may already be in the tokens while their text is withheld.
        logprobs: One for each of `token_ids`; None if the request asked for none.
        finish_reason: "stop" or "length" in the answer's last chunk, otherwise None.
        stop_reason: With "stop", the stop string or the id of the stop token; None for the model's end tokens.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class Choice:
    """One answer of a request.

    Args:
        index: Its number, from 0.
        text: The text, without the stop string unless the request asked to include it.
        token_ids: All tokens, the end token or the tokens of the stop string included.
        finish_reason: "stop" (end token, stop token or stop string), "length" (a limit was reached), or None if the
            request ended before the answer did.
        stop_reason: With "stop", the stop string or the id of the stop token; None for the model's end tokens.
        logprobs: One for each token; None if the request asked for none.
        steps: Steps of the decoder; the prefill, which gives the first token, does not count.
        accepted_by_depth: Element d is the number of steps that accepted the tree's candidate of depth d + 1.
        drafted_by_depth: Element d is the number of steps whose tree had candidates of depth d + 1 within the answer:
            those behind its limit or its end do not count.
        decode_seconds: Duration of the steps.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: tuple[TokenLogprobs, ...] | None
    steps: int
    accepted_by_depth: tuple[int, ...]
    drafted_by_depth: tuple[int, ...]
    decode_seconds: float


@dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Args:
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens of all answers together.
        cached_tokens: Tokens of the prompt whose keys and values an earlier request had computed.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answers together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Times:
    """Durations of a request, in seconds.

    Args:
        queue: From submission to the start of the prefill.
        prefill: The prefill, which gives the first token; short where most of the prompt was reused.
        decode: All further steps of all answers.
        total: From submission to the end.
    """

    queue: float
    prefill: float
    decode: float
    total: float


@dataclass(frozen=True)
class GenerationResult:
    """The result of a request; `text`, `token_ids` and so on are those of its first answer.

    Args:
        prompt_token_ids: Tokens of the prompt, as the model read it.
        choices: The answers, by index, at least one.
        seed: The seed that was used; the same one gives the same answers again.
        profile: Name of the tree that all steps verified, or "auto" or "ngram" where each step chose its draft.
        acceptance: "lossless" or "typical" (lossy).
        times: Durations.
        cached_tokens: Tokens of the prompt whose keys and values an earlier request had computed (prefix reuse).
    """

    prompt_token_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    seed: int
    profile: str
    acceptance: str
    times: Times
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first answer."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first answer ended: "stop" or "length"."""
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string or stop token that ended the first answer."""
        return self.choices[0].stop_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """Log-probabilities of the first answer's tokens, if they were asked for."""
        return self.choices[0].logprobs

    @property
    def steps(self) -> int:
        """Steps of the first answer."""
        return self.choices[0].steps

    @property
    def accepted_by_depth(self) -> tuple[int, ...]:
        """Element d is the number of the first answer's steps that accepted a candidate of depth d + 1."""
        return self.choices[0].accepted_by_depth

    @property
    def drafted_by_depth(self) -> tuple[int, ...]:
        """Element d is the number of the first answer's steps whose tree had candidates of depth d + 1."""
        return self.choices[0].drafted_by_depth

    @property
    def usage(self) -> Usage:
        """Tokens of prompt and answers."""
        completion_tokens = sum(len(choice.token_ids) for choice in self.choices)
        return Usage(len(self.prompt_token_ids), completion_tokens, self.cached_tokens)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens per step over all answers; each answer's first token, which needs no step, does not count."""
        steps = sum(choice.steps for choice in self.choices)
        return sum(len(choice.token_ids) - 1 for choice in self.choices if choice.token_ids) / steps if steps else 0.0
