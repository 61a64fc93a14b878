"""One answer as a stream of text: an iterator over pieces, with the figures of its decoding."""

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
    """One answer, streamed: an iterator over its pieces of text, each given as soon as it is certain.

    No piece splits a character. `steps` and `seconds` count decoding, `prefill_seconds` the prompt. Reading can be left
    and taken up again.

    While it is unfinished it belongs to the thread that read it last, and prompts of other threads raise BusyError. It
    ends at its end, by `close`, at the end of a `with` block, or when the last reference to it goes. In the thread that
    it belongs to, the next prompt takes the engine over, and reading on raises MedusaError. It may be read by several
    threads, one at a time, where the backend allows that (ort-cuda runs all its steps in one thread).
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, prompt: Ids[int], max_new_tokens: int) -> None:
        """Prefill the prompt; pieces come as the object is iterated over. Raises what `Decoder.start` does."""
        self.exclusive_use = ExclusiveUse("this answer")
        self._decoder, self._text = decoder, IncrementalDetokenizer(tokenizer)
        self._given = 0  # tokens whose text was given out
        self._ended = self._closed = self._torn = False
        self.prompt_tokens = len(prompt)
        self.steps = 0
        self.seconds = 0.0
        started = time.perf_counter()
        self._sequence = decoder.start_sequence(prompt, max_new_tokens)
        self.prefill_seconds = time.perf_counter() - started

    @property
    def tokens(self) -> list[int]:
        """The answer's token ids so far, the end token included; a copy."""
        return list(self._sequence.answer)

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended: "stop" (a stop token) or "length" (a limit was reached); None while it may go on."""
        return self._sequence.finish_reason

    @property
    def tokens_per_step(self) -> float:
        """Tokens that each decoding step gave; the first token is the prefill's and does not count."""
        return (len(self._sequence.answer) - 1) / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of decoding, prefill excluded."""
        return (len(self._sequence.answer) - 1) / self.seconds if self.seconds else 0.0

    def close(self) -> None:
        """Give the answer up, so that any thread may ask the engine; a step under way still ends by itself.

        Can be called from any thread, and again. Reading on before the answer's end then raises MedusaError.
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
        """Free the engine: nobody can read this answer any more."""
        if sequence := getattr(self, "_sequence", None):
            sequence.owner = None

    def __next__(self) -> str:
        """Return the next piece of text.

        Raises BusyError while another thread is reading or asking; MedusaError if the answer was closed, taken over by
        another prompt or interrupted; what `Decoder.step` raises. After BusyError, CapacityError and BackendError it
        can be read on.
        """
        try:
            return self._next()
        except (StopIteration, MedusaError):
            raise
        except BaseException:  # KeyboardInterrupt: a piece of text may be lost, so none may follow it
            self._torn = True
            raise

    @strictly_exclusive
    def _next(self) -> str:
        sequence = self._sequence
        while not self._ended:
            if self._closed:
                raise MedusaError("this answer was closed before it was read to its end; ask again for a whole one")
            if self._torn:
                raise MedusaError(
                    "reading this answer was interrupted and a piece of its text is lost; `tokens` has its ids so far: "
                    "ask again for a whole one"
                )
            if new := sequence.answer[self._given :]:
                self._given += len(new)
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
            if self._closed:  # while the step was under way, which made this thread the owner
                self._sequence.owner = None
        self.seconds += time.perf_counter() - started
        self.steps += 1
