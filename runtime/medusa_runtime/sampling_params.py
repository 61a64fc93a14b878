"""What a request asks for: how the next token is chosen, where the answer ends, and what the result contains.

Field names, formulas and the order in which they apply are those of vLLM's `SamplingParams`; the defaults are ours:
greedy decoding of at most 256 tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from medusa_profiles.profile import TreeProfile, shown

from medusa_runtime.accept import Typical
from medusa_runtime.arguments import MAX_INT, as_bool, as_int, as_optional_int
from medusa_runtime.errors import ArgumentError
from medusa_runtime.parameter_checks import (
    as_allowed_ids,
    as_bias,
    as_id_tuple,
    as_number,
    as_optional_count,
    as_texts,
)
from medusa_runtime.parameter_names import check_names, checked_names
from medusa_runtime.structured.outputs import StructuredOutputs

MAX_CHOICES = 128  # of one request
MAX_LOGPROBS = 64  # most likely tokens per position; as many as the graph's row summaries have
MAX_PENALTY = 2.0  # OpenAI's and vLLM's range of presence and frequency penalties

LOSSLESS, TYPICAL = "lossless", "typical"
AUTO, HEADS, NGRAM = DRAFTS = ("auto", "heads", "ngram")

# Fields of vLLM's class that mean something for an answer and are not implemented here.
UNSUPPORTED = (
    "allowed_tokens",
    "best_of",
    "detokenize",
    "early_stopping",
    "extra_args",
    "flat_logprobs",
    "length_penalty",
    "logits_processors",
    "logprob_token_ids",
    "output_kind",
    "priority",
    "prompt_logprobs",
    "repetition_detection",
    "spaces_between_special_tokens",
    "thinking_token_budget",
    "use_beam_search",
)


@checked_names(UNSUPPORTED)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    r"""The parameters of one request; immutable and checked when it is created.

    Example::

        SamplingParams(temperature=0.7, top_p=0.95, seed=7, stop=["\n\n"], max_tokens=200)

    Processors apply in vLLM's order: `structured_outputs`, `allowed_token_ids`, `bad_words`, `min_tokens`,
    `logit_bias`, then the repetition, frequency and presence penalties; the most likely token is taken if `temperature`
    is 0. Otherwise follow `temperature`, `min_p`, `top_k`, `top_p`, and a draw.

    Args:
        max_tokens: Maximum number of tokens of the answer; None is what the context has room for.
        min_tokens: Number of tokens before which the answer cannot end at an end token, stop token or stop string.
        temperature: Divides the logits before the softmax; 0 is greedy decoding.
        top_p: Probability mass of the most likely tokens that are considered, above 0 and up to 1.
        top_k: Number of most likely tokens that are considered; 0 or -1 is all.
        min_p: Least probability of a token that is considered, relative to the most likely token's; from 0 to 1.
        seed: A number from 0 to 2**64 - 1. The same seed gives the same answer, with every tree. None draws one, which
            the result states.
        n: Number of answers; more than one needs a temperature above 0, as greedy answers are equal.
        stop: Texts that end the answer; one text or several.
        stop_token_ids: Token ids that end the answer, in addition to the model's own.
        include_stop_str_in_output: Keep the stop string, or the text of the stop token, in the answer's text.
        ignore_eos: Do not end the answer at the model's own end tokens.
        skip_special_tokens: Leave special tokens out of the text.
        logprobs: Number of most likely tokens (up to 64) whose log-probability is returned for each position, in
            addition to the chosen token's; they are the model's own, before all processors. None returns none.
        repetition_penalty: Above 1 makes tokens of prompt and answer less likely: their logits are divided by it where
            positive, and multiplied where negative.
        presence_penalty: Is subtracted from the logit of every token of the answer so far; from -2 to 2.
        frequency_penalty: The same, times the number of its occurrences; from -2 to 2.
        logit_bias: Is added to the logits of token ids, from -100 to 100; a mapping, or a list of pairs, which becomes
            a tuple of pairs.
        allowed_token_ids: The only token ids that may be chosen.
        bad_words: Words that the answer should not contain; `docs/concepts/sampling.md` says how they are found.
        structured_outputs: What the answer has to match: `medusa_runtime.structured.StructuredOutputs`, or a mapping
            of its fields. What `max_tokens` cuts off is only the beginning of such an answer.
        truncate_prompt_tokens: Keep only so many tokens from the end of the prompt. -1 cuts only a prompt that leaves
            no room for an answer: it keeps the end, and leaves `max_tokens` for the answer, but at most a quarter of
            the context.
        profile: The tree: a name in the bundle, "plain", or a tree of your own. None is the engine's.
        draft: What steps verify: "heads" is the tree, "ngram" what followed the last tokens where the text had them
            before, "auto" whichever of these, of smaller trees and of plain decoding is expected to be the fastest.
            None is "heads" where a tree was chosen, for the request or when the engine was loaded, otherwise "auto".
            It changes no token of a lossless answer; with acceptance "typical" it is "heads".
        acceptance: "lossless" keeps the distribution of plain decoding; "typical" is the Medusa paper's rule, which is
            LOSSY: pass a `medusa_runtime.accept.Typical` for other thresholds than its defaults.

    Raises:
        ArgumentError: A name is no field, a value has a wrong type or is out of range, or two contradict each other.
    """

    max_tokens: int | None = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: str | Collection[str] = ()
    stop_token_ids: Collection[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    allowed_token_ids: Collection[int] | None = None
    bad_words: Collection[str] = ()
    structured_outputs: StructuredOutputs | Mapping[str, object] | None = None
    truncate_prompt_tokens: int | None = None
    profile: str | TreeProfile | None = None
    draft: str | None = None
    acceptance: str | Typical = LOSSLESS

    def __post_init__(self) -> None:
        """Check every field and normalise it: collections become tuples, numbers int and float."""
        values = {
            "max_tokens": as_optional_int("max_tokens", self.max_tokens, 1),
            "min_tokens": as_int("min_tokens", self.min_tokens, 0),
            "temperature": as_number("temperature", self.temperature, 0, math.inf),
            "top_p": as_number("top_p", self.top_p, 0, 1),
            "top_k": max(0, as_int("top_k", self.top_k, -1)),
            "min_p": as_number("min_p", self.min_p, 0, 1),
            "seed": as_optional_count(
                "seed", self.seed, MAX_INT, "a random seed; expected a number from 0 up, or None, which draws one"
            ),
            "n": as_int("n", self.n, 1, most=MAX_CHOICES),
            "stop": as_texts("stop", (self.stop,) if isinstance(self.stop, str) else self.stop, _STOP),
            "stop_token_ids": as_id_tuple("stop_token_ids", self.stop_token_ids),
            "logprobs": as_optional_count(
                "logprobs", self.logprobs, MAX_LOGPROBS, f"all tokens; expected at most {MAX_LOGPROBS}, or None"
            ),
            "repetition_penalty": as_number("repetition_penalty", self.repetition_penalty, 0, math.inf),
            "presence_penalty": as_number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
            "frequency_penalty": as_number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
            "logit_bias": None if self.logit_bias is None else as_bias(self.logit_bias),
            "allowed_token_ids": None if self.allowed_token_ids is None else as_allowed_ids(self.allowed_token_ids),
            "bad_words": as_texts("bad_words", self.bad_words),
            "structured_outputs": StructuredOutputs.of_optional(self.structured_outputs),
            "truncate_prompt_tokens": _truncation(self.truncate_prompt_tokens),
            "acceptance": _acceptance(self.acceptance),
        }
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            values[name] = as_bool(name, getattr(self, name))
        for name, value in values.items():
            object.__setattr__(self, name, value)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise ArgumentError(f"{name} is 0; expected a number above 0: 1 switches it off")
        if self.profile is not None and not (isinstance(self.profile, TreeProfile) or _is_name(self.profile)):
            raise ArgumentError(
                f"profile is {shown(self.profile)}, of type {type(self.profile).__name__}; expected the name of a tree "
                "in the bundle, 'plain', or a TreeProfile"
            )
        if self.draft is not None and not (isinstance(self.draft, str) and self.draft in DRAFTS):
            raise ArgumentError(f"draft is {shown(self.draft)}; expected one of {', '.join(DRAFTS)}, or None")
        self._check_together()

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ArgumentError(
                f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; expected min_tokens to be at most "
                "max_tokens"
            )
        if self.structured_outputs is not None and self.ignore_eos:
            raise ArgumentError(
                "ignore_eos is True with structured_outputs; expected False, as only an end follows a complete answer"
            )
        if self.draft not in (None, HEADS) and (self.is_typical or self.profile is not None):
            other = "acceptance 'typical', whose tokens depend on the draft" if self.is_typical else "a profile"
            raise ArgumentError(
                f"draft is {self.draft!r} with {other}; expected {HEADS!r}, the same tree in every step: leave out one "
                "of the two"
            )
        if self.n > 1 and self.is_typical:
            raise ArgumentError(
                f"n is {self.n} with acceptance 'typical'; expected 1, as this rule draws nothing and all answers "
                "would be equal: leave n out, or use acceptance 'lossless' with a temperature"
            )
        if self.n > 1 and self.is_greedy:
            raise ArgumentError(
                f"n is {self.n} with temperature 0; expected n=1, as all answers would be equal: set a temperature"
            )
        if not self.is_typical:
            return
        for name in _LOSSLESS_ONLY:
            value = getattr(self, name)
            if value != _DEFAULTS[name]:
                got = "set" if name == "structured_outputs" else shown(value)
                raise ArgumentError(
                    f"{name} is {got} with acceptance 'typical'; expected the default {_DEFAULTS[name]!r}, as "
                    "this rule has a temperature of its own and no processors: use acceptance 'lossless', or leave "
                    f"{name} out"
                )

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> SamplingParams:
        """Create parameters from untrusted JSON.

        A field that is null has its default, and one that is not supported may be null too.

        Raises:
            ArgumentError: A field is unknown, not supported, or invalid; the message names it.
        """
        if not isinstance(fields, Mapping):
            raise ArgumentError(
                f"the parameters are {shown(fields)}, of type {type(fields).__name__}; expected a JSON object"
            )
        may_be_null = {*_DEFAULTS, *UNSUPPORTED}
        stated = {name: value for name, value in fields.items() if value is not None or name not in may_be_null}
        check_names(stated, _DEFAULTS, UNSUPPORTED)
        return cls(**stated)  # type: ignore[arg-type]

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, after the processors."""
        return self.temperature == 0

    @property
    def is_typical(self) -> bool:
        """Whether candidates are accepted that plain decoding might not have chosen."""
        return isinstance(self.acceptance, Typical)

    @property
    def has_processors(self) -> bool:
        """Whether logits are changed before the most likely token is taken or one is drawn."""
        return (
            self.structured_outputs is not None
            or self.allowed_token_ids is not None
            or bool(self.bad_words)
            or self.min_tokens > 0
            or bool(self.logit_bias)
            or self.has_penalties
        )

    @property
    def has_filters(self) -> bool:
        """Whether a draw is from fewer tokens than all."""
        return not self.is_greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens before."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ArgumentError where a token id is outside a vocabulary of `vocab_size` tokens."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for entry in getattr(self, name) or ():
                token = entry[0] if name == "logit_bias" else entry
                if token >= vocab_size:
                    raise ArgumentError(
                        f"{name} has the token id {shown(token)}; expected one from 0 to {vocab_size - 1}: was another "
                        "tokenizer used?"
                    )


_STOP = "one text, or a list of texts"
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
_LOSSLESS_ONLY = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _truncation(value: object) -> int | None:
    found = as_optional_int("truncate_prompt_tokens", value, -1)
    if found == 0:
        raise ArgumentError("truncate_prompt_tokens is 0; expected a number from 1 up, or -1")
    return found


def _acceptance(value: object) -> str | Typical:
    if isinstance(value, Typical):
        return value
    if isinstance(value, str) and value in (LOSSLESS, TYPICAL):
        return LOSSLESS if value == LOSSLESS else Typical()
    raise ArgumentError(
        f"acceptance is {shown(value)}; expected {LOSSLESS!r}, {TYPICAL!r} or an object of "
        "medusa_runtime.accept.Typical"
    )
