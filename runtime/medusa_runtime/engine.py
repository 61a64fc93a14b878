"""Text in, text out: a bundle, a backend and a tree behind one `generate`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, overload

from medusa_profiles.profile import TreeProfile

from medusa_runtime.accept import RULES
from medusa_runtime.backends import Backend, load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import MedusaError
from medusa_runtime.facts import PLAIN
from medusa_runtime.layout import Layout, Prompt
from medusa_runtime.text import TextStream


class Engine:
    """Answers prompts with a bundle, one at a time.

    engine = Engine.load("bundle", backend="ort-cpu", profile="tree-8")
    for piece in engine.generate("Why is the sky blue?", stream=True): print(piece, end="")
    """

    def __init__(self, bundle: Bundle, backend: Backend, profile: TreeProfile, accept: str = "greedy") -> None:
        """Put a bundle's tokenizer, a loaded backend and a tree together; most callers want `Engine.load`."""
        if accept not in RULES:
            raise MedusaError(f"unknown accept rule {accept!r}; expected one of {', '.join(RULES)}")
        self.bundle = bundle
        self.layout = Layout(bundle)
        self.tokenizer = self.layout.tokenizer
        self.decoder = Decoder(backend, profile, RULES[accept])

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        backend: str = "ort-cpu",
        profile: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        max_length: int | None = None,
        accept: str = "greedy",
    ) -> Engine:
        """Check and load a bundle.

        profile: one of the bundle's trees, "plain" for plain decoding, None for the one that suits the precision.
        precision: None for the only one, or fp32. threads: None means `threads.default_threads`. max_length: tokens
        that prompt and answer may come to, which bounds the memory taken; None for the model's context. accept:
        "greedy" gives the decoder's own tokens; "typical" is the paper's rule and LOSSY. Raises BundleError,
        MissingExtraError or CapacityError.
        """
        opened = Bundle.open(bundle)
        tree = opened_profile(opened, profile or opened.graph(backend, precision)[0].profile)
        return cls(opened, load_backend(opened, backend, precision, threads, max_length), tree, accept)

    def warm_up(self) -> None:
        """Make ready for prompts and answers of all lengths (`Decoder.warm_up`): for a service, before the first."""
        self.decoder.warm_up()

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Lay a prompt out by the chat template and turn it into token ids.

        `raw` takes a text as it stands, with the special tokens that the tokenizer itself adds. Raises PromptError
        for an empty prompt.
        """
        return self.layout.encode(prompt, raw=raw)

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, max_new_tokens: int = 256, raw: bool = False
    ) -> str: ...

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], max_new_tokens: int = 256, raw: bool = False
    ) -> Generation: ...

    def generate(
        self, prompt: Prompt, *, stream: bool = False, max_new_tokens: int = 256, raw: bool = False
    ) -> str | Generation:
        """Answer a prompt: the whole text, or with `stream` a `Generation` to iterate over.

        The answer ends with one of the model's end tokens or after `max_new_tokens`. Raises PromptError or
        CapacityError.
        """
        generation = Generation(self, self.encode(prompt, raw=raw), max_new_tokens)
        return generation if stream else "".join(generation)


class Generation:
    """One answer, streamed: iterate for its pieces of text; none splits a character.

    `tokens` are the answer's ids so far; `steps` and `seconds` count decoding, `prefill_seconds` the prompt; `finish`
    is None until the end, then "stop", "length" or "context".
    """

    def __init__(self, engine: Engine, prompt: list[int], max_new_tokens: int) -> None:
        """Prefill the prompt; pieces come as the object is iterated over."""
        self._decoder = engine.decoder
        self._text = TextStream(engine.tokenizer)
        self.prompt_tokens = len(prompt)
        started = time.perf_counter()
        self._first = self._decoder.start(prompt, max_new_tokens)
        self.prefill_seconds = time.perf_counter() - started
        sequence = self._decoder.sequence
        assert sequence is not None  # noqa: S101 -- start() has just set it
        self._sequence = sequence
        self.steps = 0
        self.seconds = 0.0

    @property
    def tokens(self) -> list[int]:
        """The answer's token ids so far, the end token included."""
        return self._sequence.answer

    @property
    def finish(self) -> str | None:
        """Why the answer ended; None while it may go on."""
        return self._sequence.finish

    @property
    def tokens_per_step(self) -> float:
        """Tokens that each decoding step gave; the first token is the prefill's and does not count."""
        return (len(self.tokens) - 1) / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of decoding, prefill excluded."""
        return (len(self.tokens) - 1) / self.seconds if self.seconds else 0.0

    def __iter__(self) -> Iterator[str]:
        """Give the pieces of text, each as soon as it is certain. Can be left and taken up again."""
        if piece := self._text.push(self._take_first()):
            yield piece
        while self._sequence.finish is None:
            if self._decoder.sequence is not self._sequence:
                raise MedusaError("another prompt was started on this engine before this answer was read to its end")
            started = time.perf_counter()
            taken = self._decoder.step()
            self.seconds += time.perf_counter() - started
            self.steps += 1
            if piece := self._text.push(taken):
                yield piece
        if piece := self._text.finish():
            yield piece

    def _take_first(self) -> list[int]:
        first, self._first = self._first, []
        return first


def opened_profile(bundle: Bundle, name: str) -> TreeProfile:
    """Return a bundle's tree by name; "plain" is always there. Raises BundleError with the list of what there is."""
    return TreeProfile.plain() if name == PLAIN else bundle.profile(name)
