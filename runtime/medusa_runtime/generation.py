"""A streamed answer: an iterator over pieces of text, with the statistics of its decoding."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from types import TracebackType

from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import MedusaError
from medusa_runtime.exclusive import ExclusiveUse, strictly_exclusive
from medusa_runtime.tokenizer import IncrementalDetokenizer, Tokenizer


class Generation(Iterator[str]):
    """A streamed answer: an iterator over pieces of text, which `Engine.generate(stream=True)` returns.

    Each piece is returned as soon as no later token can change it, and no piece splits a character. Reading may pause
    and continue.

    Example::

        with engine.generate("Why is the sky blue?", stream=True) as answer:
            for piece in answer:
                print(piece, end="", flush=True)
        print(answer.finish_reason, f"{answer.tokens_per_step:.2f} tokens/step")

    Threads: an unfinished answer belongs to the thread that read it last, and prompts from other threads raise
    BusyError. That ends when the answer is complete or closed (`close`, the end of a `with` block, or the last
    reference dropped). In the owning thread the next prompt takes over the engine, and reading on raises MedusaError.
    Several threads may read one answer, one at a time, where the backend allows it (ort-cuda runs all steps in one
    thread).

    Attributes:
        prompt_tokens: Number of tokens of the prompt.
        steps: Decoding steps so far; the prefill does not count.
        seconds: Duration of these steps.
        prefill_seconds: Duration of the prefill, which computes the first token.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, prompt: Ids[int], max_new_tokens: int) -> None:
        """Prefill the prompt, as `Decoder.start` does; iteration runs the steps.

        Args:
            decoder: Runs the steps.
            tokenizer: Turns token ids into text.
            prompt: Token ids of the prompt.
            max_new_tokens: Maximum number of tokens of the answer.
        """
        self.exclusive_use = ExclusiveUse("this answer")
        self._decoder, self._text = decoder, IncrementalDetokenizer(tokenizer)
        self._detokenized = 0  # tokens that were passed to the detokenizer
        self._ended = self._closed = self._interrupted = False
        self.prompt_tokens = len(prompt)
        self.steps = 0
        self.seconds = 0.0
        started = time.perf_counter()
        self._sequence = decoder.start_sequence(prompt, max_new_tokens)
        self.prefill_seconds = time.perf_counter() - started

    @property
    def tokens(self) -> list[int]:
        """A copy of the answer's token ids so far, including the end token."""
        return list(self._sequence.answer)

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended: "stop" (a stop token) or "length" (a limit was reached); None while it may go on."""
        return self._sequence.finish_reason

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens per decoding step; the first token, which the prefill computes, does not count."""
        return (len(self._sequence.answer) - 1) / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of decoding, without the prefill and its token."""
        return (len(self._sequence.answer) - 1) / self.seconds if self.seconds else 0.0

    def close(self) -> None:
        """End the answer, so that any thread may use the engine; a running step still completes.

        It may be called from any thread and more than once. Reading on an unfinished answer then raises MedusaError.
        """
        self._closed = True
        self._sequence.owner = None

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        """Free the engine, as nobody can read this answer any more."""
        if sequence := getattr(self, "_sequence", None):
            sequence.owner = None

    def __next__(self) -> str:
        """Return the next piece of text.

        Raises:
            BusyError: Another thread is reading this answer or decoding; reading may continue later.
            MedusaError: The answer was closed or interrupted, or another prompt took over the engine.
            CapacityError: Memory does not suffice; reading may continue.
            BackendError: The backend's library failed; reading may continue.
            InvalidLogitsError: The backend computed invalid logits.
        """
        try:
            return self._next()
        except (StopIteration, MedusaError):
            raise
        except BaseException:  # KeyboardInterrupt: a piece of text may be lost, so none may follow it
            self._interrupted = True
            raise

    @strictly_exclusive
    def _next(self) -> str:
        sequence = self._sequence
        while not self._ended:
            if self._closed:
                raise MedusaError("this answer was closed before it was read to its end; ask again for a whole one")
            if self._interrupted:
                raise MedusaError(
                    "reading this answer was interrupted and a piece of its text is lost; `tokens` has its ids so far: "
                    "ask again for a whole one"
                )
            if new := sequence.answer[self._detokenized :]:
                self._detokenized += len(new)
                if piece := self._text.push(new):
                    return piece
            elif sequence.finish_reason is None:
                self._step()
            else:
                self._ended = True
                if piece := self._text.flush():
                    return piece
        raise StopIteration

    def _step(self) -> None:
        started = time.perf_counter()
        try:
            self._decoder.step(self._sequence)
        finally:
            if self._closed:  # during the step, which made this thread the owner
                self._sequence.owner = None
        self.seconds += time.perf_counter() - started
        self.steps += 1
