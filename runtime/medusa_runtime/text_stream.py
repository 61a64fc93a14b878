"""The text of an answer while it grows: what can be sent already, and where a stop string ends it."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from medusa_profiles.profile import shown

from medusa_runtime.detokenizer import IncrementalDetokenizer
from medusa_runtime.errors import ArgumentError, MedusaError
from medusa_runtime.tokenizer import Tokenizer

_END = 8  # characters by which stop strings are looked up, before they are compared as a whole


class StopMatch(NamedTuple):
    """A stop string that was found.

    Attributes:
        string: The stop string.
        tokens: Number of tokens of the push that count; the last one completed the string.
    """

    string: str
    tokens: int


class StopStrings:
    """A set of texts that end an answer, searched for in text that grows.

    The string that is complete first wins, whichever begins first; if several end with the same character, the first
    in the list does. This is vLLM's rule, and the result of adding one character at a time.

    Args:
        strings: The texts, at least one; none is empty.

    Raises:
        ArgumentError: A text is empty, or there is none.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if isinstance(strings, str) or not strings or not all(strings):
            raise ArgumentError(f"stop is {shown(strings)}; expected a list of texts that are not empty")
        self._sorted = sorted(strings)
        self._longest = max(map(len, strings))
        self._by_end: dict[str, list[tuple[int, str]]] = {}  # last characters to places in the list and strings
        for entry in enumerate(strings):
            self._by_end.setdefault(entry[1][-_END:], []).append(entry)
        self._end_lengths = sorted({len(end) for end in self._by_end})
        self._first_character = _any_of({string[0] for string in strings})
        self._last_character = _any_of({string[-1] for string in strings})

    def find(self, text: str, start: int) -> tuple[str, int] | None:
        """Return the stop string that is complete first, of those that end after the first `start` characters.

        Args:
            text: The text; stop strings may begin anywhere in it.
            start: Number of characters that were searched before.

        Returns:
            The stop string and its end in the text; None if there is none.
        """
        for last in self._last_character.finditer(text, start):
            end = last.end()
            complete = [
                entry
                for length in self._end_lengths
                for entry in self._by_end.get(text[max(0, end - length) : end], ())
                if text.endswith(entry[1], 0, end)
            ]
            if complete:
                return min(complete)[1], end
        return None

    def find_open_end(self, text: str) -> int:
        """Return where the longest end of the text begins with which a stop string begins; len(text) if there is none.

        A text that grows may be cut there each time, as what later becomes a stop string begins no earlier. Then no
        character is tried twice as the beginning.
        """
        for first in self._first_character.finditer(text, max(0, len(text) - self._longest + 1)):
            end = text[first.start() :]
            following = bisect_right(self._sorted, end)  # strings that begin with `end` and are longer follow it
            if following < len(self._sorted) and self._sorted[following].startswith(end):
                return first.start()
        return len(text)


class TextStream:
    r"""The text of one answer while it grows, with stop strings.

    The text, the stop string and the number of tokens are the same however the tokens are divided into pushes, and so
    the same as with one token at a time.

    Stop strings may span tokens, and begin or end inside of one. The text ends right before the stop string, or right
    behind it with `include_stop`; what its last token has behind it is left out in both cases. Stop strings are
    searched for in complete characters only: neither in the U+FFFD of incomplete ones, nor in the prompt.

    Example::

        stream = TextStream(tokenizer, stop=["\n\n"])
        for tokens in steps:
            match = stream.push(tokens)
            print(stream.take(), end="")
            if match:
                break
        stream.finish()
        print(stream.take())

    Args:
        tokenizer: Decodes the tokens.
        stop: Texts that end the answer (see `StopStrings` for which one wins).
        include_stop: Keep the stop string, or the text of the stop token, in the text.
        skip_special_tokens: Leave special tokens out of the text.
        min_tokens: Number of tokens in whose text no stop string ends the answer. As in vLLM, one that begins in it and
            is completed by a later token does; one that lies in it never does, also when the answer goes on.

    Raises:
        ArgumentError: A stop string is empty.
        BundleError: The tokenizer's vocabulary cannot be read.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stop = StopStrings(stop) if stop else None
        self._include_stop = include_stop
        self._unsearched = min_tokens  # tokens still to come in whose text no stop string counts
        self._pieces: list[str] = []  # certain text
        self._taken = 0  # pieces that `take` returned
        self._open = ""  # text behind them that may become a stop string: all of it begins one
        self._is_finished = False

    @property
    def text(self) -> str:
        """The text so far: all that `take` returned, and what it would return now."""
        return "".join(self._pieces)

    def push(self, ids: Sequence[int], *, ends_with_stop_token: bool = False) -> StopMatch | None:
        """Add the tokens of a step.

        Args:
            ids: The tokens, in order.
            ends_with_stop_token: The last one is an end token or stop token, which ends the answer. Its text is left
                out and not searched for stop strings, unless the stream was created with `include_stop`.

        Returns:
            The stop string that ends the answer, and the number of `ids` up to it; the others are dropped and the
            stream is finished. None if there is none.

        Raises:
            MedusaError: The stream is finished.
            BundleError: The tokenizer fails on the tokens.
        """
        if self._is_finished:
            raise MedusaError(f"{len(ids)} tokens were added to a finished text; expected none: begin a new stream")
        shown = ids[:-1] if ends_with_stop_token and not self._include_stop else ids
        if self._stop is None:
            self._pieces.append(self._detokenizer.push(shown))
            return None
        count = min(self._unsearched, len(shown))
        if count:
            self._unsearched -= count
            self._append(self._stop, self._detokenizer.push(shown[:count]))
        return self._push_searched(self._stop, shown[count:], count)

    def _push_searched(self, stop: StopStrings, ids: Sequence[int], before: int) -> StopMatch | None:
        """Add tokens and search their text, behind `before` tokens of the same push that are not searched."""
        snapshot = self._detokenizer.copy()
        piece = self._detokenizer.push(ids)
        found = stop.find(self._open + piece, len(self._open))
        if found is None:
            self._append(stop, piece)
            return None
        string, end = found
        tokens = before + _tokens_of(snapshot, ids, end - len(self._open))
        self._pieces.append((self._open + piece)[: end if self._include_stop else end - len(string)])
        self._open = ""
        self._is_finished = True
        return StopMatch(string, tokens)

    def _append(self, stop: StopStrings, piece: str) -> None:
        """Add certain text, and withhold its end as long as that may become a stop string."""
        text = self._open + piece
        end = stop.find_open_end(text)
        self._pieces.append(text[:end])
        self._open = text[end:]

    def take(self) -> str:
        """Return the text that was not returned yet and that no later token can change or remove.

        Part of a character is withheld until it is complete, and the beginning of a stop string (also with
        `include_stop`) until it is one or cannot become one any more. Joined, the results are the final text.
        """
        new = "".join(self._pieces[self._taken :])
        self._taken = len(self._pieces)
        return new

    def finish(self) -> None:
        """Add no further tokens: release what was withheld, with U+FFFD for incomplete characters.

        After a stop string, and when called again, it changes nothing.
        """
        if not self._is_finished:
            self._is_finished = True
            self._pieces.append(self._open + self._detokenizer.flush())
            self._open = ""


def _tokens_of(detokenizer: IncrementalDetokenizer, ids: Sequence[int], length: int) -> int:
    """Return how many tokens have to be added one by one until their text has `length` characters."""
    for count, token in enumerate(ids, start=1):
        length -= len(detokenizer.push([token]))
        if length <= 0:
            return count
    return len(ids)


def _any_of(characters: set[str]) -> re.Pattern[str]:
    return re.compile("[" + "".join(map(re.escape, sorted(characters))) + "]")
