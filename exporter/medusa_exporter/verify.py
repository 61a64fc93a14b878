"""Where two decodings of one prompt part, and whether that is more than a tie between floats."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from medusa_runtime.backends.base import FloatArray
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import UnsupportedModelError
from medusa_runtime.tokenizer import Tokenizer

from medusa_exporter import models
from medusa_exporter.extras import import_extra
from medusa_exporter.models import ModelSource

if TYPE_CHECKING:
    from medusa_runtime.facts import ModelFacts

TOLERANCE = 1e-3  # logits closer than this are a tie: sums of another order of the same floats can turn it
# In fewer bits (16 too) another number of rows is rounded in another way: a share of the row's range is a tie.
ROUNDED_TOLERANCE = 0.01
SHAPE = ("family", "layers", "hidden_size", "attention_heads", "kv_heads", "head_dim", "vocab_size")

_ENTRY = "The {0} ferry left the north quay at {0} past nine with timber, salt and eleven passengers on board. "
PROMPTS: tuple[tuple[str, ...], ...] = (
    ("Describe the smell of a bakery at dawn in three sentences.", "Now say it as a single line of a poem."),
    ("Write a Python function that returns the second largest number of a list, without sorting it.",),
    ("List five things to check before a long bicycle tour, one per line, numbered.",),
    ("Explique en français pourquoi les feuilles des arbres changent de couleur en automne.",),
    ("What is 17 + 25? Answer with the number alone.",),
    (  # longer than one chunk of the prefill
        "Here is a harbour log.\n"
        + "".join(_ENTRY.format(word) for word in ("first", "second", "third", "fourth", "fifth") * 4)
        + "\nSum up the log in one sentence.",
    ),
)

NextLogits = Callable[[list[int]], FloatArray]  # token ids -> (V,): the logits of the token behind them


@dataclass(frozen=True)
class Difference:
    """Where two answers to one prompt part for the first time.

    position: index of the token in the answer, from 0. expected, got: the token ids there, None for an answer that
    had ended. gap: how far the less likely of the two lies below the likeliest token, in logits; None if one answer
    had ended or a logit is not finite. share: the gap as a share of that row's range, from its lowest logit to its
    highest. exact: whether only floats in another order may part the two (`is_exact`).
    """

    position: int
    expected: int | None
    got: int | None
    gap: float | None
    share: float | None = field(default=None, compare=False)
    exact: bool = True

    @property
    def fails(self) -> bool:
        """Whether this is more than a tie, which TOLERANCE bounds in fp32, ROUNDED_TOLERANCE elsewhere."""
        if self.gap is None:
            return True
        return self.gap > TOLERANCE if self.exact else self.share is None or self.share > ROUNDED_TOLERANCE

    def describe(self, tokenizer: Tokenizer) -> str:
        """Say in one line what was expected, what came and how far apart they are."""
        got, expected = (_shown(token, tokenizer) for token in (self.got, self.expected))
        gap = "logit gap unknown" if self.gap is None else f"logit gap {self.gap:.2e}"
        verdict = f"not a tie (at most {TOLERANCE:g})" if self.fails else "a tie in float"
        if not self.exact:
            gap += "" if self.share is None else f", {self.share:.2%} of the row's range"
            verdict = f"not a tie (at most {ROUNDED_TOLERANCE:.0%})" if self.fails else "a tie of rounded products"
        return f"token {self.position} is {got}, expected {expected}; {gap}, {verdict}"


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Return the first index at which two token lists differ, the end of the shorter one included; None if equal."""
    for index, pair in enumerate(zip(expected, got, strict=False)):
        if pair[0] != pair[1]:
            return index
    return None if len(expected) == len(got) else min(len(expected), len(got))


def is_exact(precision: str) -> bool:
    """Whether a graph of this precision gives the same tokens whatever the number of rows, but for ties in float."""
    return precision == "fp32"


def tolerances(exact: bool) -> dict[str, float | None]:
    """What counts as a tie, as reports tell it: in logits, or as a share of the row's range."""
    return {
        "gap_tolerance": TOLERANCE if exact else None,
        "gap_share_tolerance": None if exact else ROUNDED_TOLERANCE,
    }


def compare(
    prompt: Sequence[int], expected: Sequence[int], got: Sequence[int], *readers: NextLogits, exact: bool = True
) -> Difference | None:
    """Compare two answers to `prompt`; None if they are equal.

    readers: whose logits behind prompt and common tokens measure the gap; the widest gap counts. exact: see Difference.
    """
    position = first_difference(expected, got)
    if position is None:
        return None
    if position >= min(len(expected), len(got)):
        ends = [answer[position] if position < len(answer) else None for answer in (expected, got)]
        return Difference(position, ends[0], ends[1], None, exact=exact)
    ids, pair = [*prompt, *expected[:position]], (expected[position], got[position])
    gaps, shares = zip(*(_gap(reader(ids), pair) for reader in readers), strict=True)
    finite = all(map(math.isfinite, gaps))
    return Difference(position, *pair, max(gaps) if finite else None, max(shares) if finite else None, exact=exact)


def next_logits(decoder: Decoder) -> NextLogits:
    """Return a reader that runs the bundle's plain prefill; whatever the decoder was decoding is forgotten."""

    def read(ids: list[int]) -> FloatArray:
        decoder.start(ids, 1, stop_ids=())
        return decoder.backend.read_logits(0)

    return read


class Reference:
    """The model as transformers runs it: fp32, greedy, on the CPU, with its KV cache."""

    def __init__(self, model: str, facts: ModelFacts) -> None:
        """Load `model` (hub name, folder or GGUF file), which must have the shape that the bundle states in `facts`.

        Raises MissingExtraError without transformers, UnsupportedModelError for what is no model or another one.
        """
        torch = import_extra("torch", "export")
        transformers = import_extra("transformers", "export")
        transformers.utils.logging.set_verbosity_error()
        from medusa_exporter.build import model_facts

        source = ModelSource.resolve(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model = models.load_model(source, torch.float32)
        found = model_facts(self._model, source, facts.eos_token_ids, facts.context)
        for name in SHAPE:
            if getattr(found, name) != getattr(facts, name):
                raise UnsupportedModelError(
                    f"{model}: its {name} is {getattr(found, name)}, the bundle's is {getattr(facts, name)}; "
                    "give the model that the bundle was built from"
                )
        self._torch, self._context = torch, facts.context
        stop = list(facts.eos_token_ids)
        # a fresh one: the model's own may ask for sampling or penalties, which are not the decoder's own greedy tokens
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False, num_beams=1, use_cache=True, eos_token_id=stop or None, pad_token_id=stop[0] if stop else 0
        )

    def answer(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy answer's token ids, the end token included; it ends as a `Decoder`'s answer does."""
        ids = self._torch.tensor([list(prompt)])  # (1, P)
        with self._torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=min(max_new_tokens, self._context - len(prompt)),
            )
        answer: list[int] = whole[0, ids.shape[1] :].tolist()
        return answer

    def next_logits(self, ids: list[int]) -> FloatArray:
        """Return (V,): the logits of the token behind `ids`."""
        with self._torch.inference_mode():
            logits: FloatArray = self._model(self._torch.tensor([ids])).logits[0, -1].numpy()
        return logits


def _gap(logits: FloatArray, tokens: tuple[int, int]) -> tuple[float, float]:
    """How far the less likely token lies below the likeliest: in logits, and as a share of the row's range."""
    gap = float(logits.max()) - min(float(logits[token]) for token in tokens)
    reach = float(logits.max()) - float(logits.min())
    return gap, gap / reach if reach else math.inf if gap else 0.0


def _shown(token: int | None, tokenizer: Tokenizer) -> str:
    if token is None:
        return "no token (the answer had ended)"
    return f"{token} {tokenizer.decode([token])!r}" if tokenizer.token(token) else f"{token} (a special token)"
