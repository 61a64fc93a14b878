"""The distilled data set: rows of token ids in which the model's answers are marked, in NumPy files without pickles.

A folder holds

- `tokens.npy`: all rows one after another, uint16 or uint32,
- `offsets.npy`: (R+1,) int64, where each row starts and ends; row 0 is `tokens[offsets[0]:offsets[1]]`,
- `answer.npy`: one bit per token, packed: whether it belongs to an answer,
- `temperature.npy`: (R,) float32: 0 for greedy answers, NaN for answers that the model did not generate,
- `groups.npy`: (R,) uint64: a hash of the conversation's first user turn,
- `meta.json`: which model the rows were distilled from, and how.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from medusa_runtime.errors import MedusaError

from medusa_exporter.files import atomic_write_files, finish_interrupted_write, write_json
from medusa_exporter.output_kinds import DATA_ARRAYS as ARRAYS
from medusa_exporter.output_kinds import DATA_FORMAT as FORMAT

META_NAME = "meta.json"

Array = npt.NDArray[Any]
Row = tuple[Array, Array, float, int]  # tokens (n,), answer marks (n,) bool, temperature, group


class DataError(MedusaError):
    """A data set is missing, damaged, of another model, or too small."""


@dataclass(frozen=True)
class DataFacts:
    """Which model the rows were distilled from, and how.

    Attributes:
        model: The model's name.
        digest: Digest of the model's weights, see `training.model_digest`.
        vocab_size: Size of the model's vocabulary.
        eos: The ids that end an answer.
        seed: Seed of the run.
        settings: What `distill` was asked for, see `Plan.settings`.
    """

    model: str
    digest: str
    vocab_size: int
    eos: tuple[int, ...]
    seed: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """R rows of T tokens in all.

    Attributes:
        facts: Which model the rows were distilled from, and how.
        tokens: (T,) token ids.
        offsets: (R+1,) where each row starts and ends.
        answer: (T,) bool, whether a token belongs to an answer.
        temperature: (R,) sampling temperature of the answers.
        groups: (R,) hash of each conversation's first user turn.

    Raises:
        DataError: The sizes do not fit together, or an id is outside the vocabulary.
    """

    facts: DataFacts
    tokens: Array
    offsets: Array
    answer: Array
    temperature: Array
    groups: Array

    def __post_init__(self) -> None:
        rows = len(self.offsets) - 1
        if (
            rows < 0
            or self.offsets[0] != 0
            or self.offsets[-1] != len(self.tokens)
            or (np.diff(self.offsets) < 0).any()
        ):
            raise DataError(
                "data set: offsets must rise from 0 to the number of tokens; the files do not belong together: "
                "run medusa-export distill again"
            )
        if len(self.answer) != len(self.tokens) or len(self.temperature) != rows or len(self.groups) != rows:
            raise DataError(
                f"data set: {len(self.tokens)} tokens in {rows} rows, but {len(self.answer)} answer marks, "
                f"{len(self.temperature)} temperatures and {len(self.groups)} groups; the files do not belong "
                "together: run medusa-export distill again"
            )
        if len(self.tokens) and int(self.tokens.max()) >= self.facts.vocab_size:
            raise DataError(
                f"data set: token {int(self.tokens.max())} is outside the vocabulary of {self.facts.vocab_size}; "
                "run medusa-export distill again"
            )

    @property
    def rows(self) -> int:
        """Return the number of rows, R."""
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[Array, Array]:
        """Return the tokens and the answer marks of one row."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[span], self.answer[span]

    def held_out(self, fraction: float) -> Array:
        """Return which rows are held out from training, (R,) bool; rows with the same first turn stay together."""
        return self.groups.astype(np.float64) < fraction * 2.0**64

    def select(self, chosen: Array) -> DataSet:
        """Return the rows where `chosen` (R,) is true."""
        lengths = np.diff(self.offsets)
        marks = np.repeat(chosen, lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64)
        return DataSet(
            self.facts, self.tokens[marks], offsets, self.answer[marks], self.temperature[chosen], self.groups[chosen]
        )


def group_of(text: str) -> int:
    """Hash a conversation's first user turn to 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def from_rows(facts: DataFacts, rows: Sequence[Row]) -> DataSet:
    """Build a data set of its rows."""
    dtype = np.uint16 if facts.vocab_size < 2**16 else np.uint32
    return DataSet(
        facts,
        tokens=np.concatenate([np.zeros(0, dtype), *(row[0] for row in rows)], dtype=dtype, casting="unsafe"),
        offsets=np.cumsum([0, *(len(row[0]) for row in rows)], dtype=np.int64),
        answer=np.concatenate([np.zeros(0, bool), *(row[1] for row in rows)]),
        temperature=np.array([row[2] for row in rows], np.float32),
        groups=np.array([row[3] for row in rows], np.uint64),
    )


def concatenate(sets: list[DataSet]) -> DataSet:
    """Join data sets of one model; raise DataError when there are none or their digests differ."""
    if not sets:
        raise DataError("no data set given; expected at least one folder that medusa-export distill wrote")
    if any(data.facts.digest != sets[0].facts.digest for data in sets):
        raise DataError(
            f"data sets of different models: {sorted({data.facts.model for data in sets})}; give one model's"
        )
    starts = np.cumsum([0, *(len(data.tokens) for data in sets)])
    offsets = [data.offsets[1:] + start for data, start in zip(sets, starts, strict=False)]
    joined = {
        name: np.concatenate([getattr(data, name) for data in sets])
        for name in ("tokens", "answer", "temperature", "groups")
    }
    return DataSet(sets[0].facts, offsets=np.concatenate([[0], *offsets]).astype(np.int64), **joined)


def save_data(data: DataSet, folder: str | Path) -> None:
    """Write `data` into `folder`; all of its files appear together, or those before stay."""
    with atomic_write_files(Path(folder)) as new:
        for name in ARRAYS:
            array = getattr(data, name)
            np.save(new / f"{name}.npy", np.packbits(array) if name == "answer" else array, allow_pickle=False)
        write_json(new / META_NAME, {"format": FORMAT, **asdict(data.facts)})


def load_facts(folder: str | Path) -> DataFacts:
    """Read meta.json; raise DataError when there is none or it lacks a key."""
    path = Path(folder) / META_NAME
    finish_interrupted_write(path.parent)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise DataError(f"{path}: format {meta['format']!r}, expected {FORMAT!r}; run medusa-export distill again")
        facts = DataFacts(**{field.name: meta[field.name] for field in fields(DataFacts)} | {"eos": tuple(meta["eos"])})
        if not isinstance(facts.vocab_size, int):
            raise DataError(f"{path}: vocab_size is {facts.vocab_size!r}, expected a whole number")
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: no {META_NAME} in it; expected a folder that `medusa-export distill` finished"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: damaged ({type(error).__name__}: {error}); run medusa-export distill again"
        ) from error
    return facts


def load_data(folder: str | Path) -> DataSet:
    """Read a data set; raise DataError when a file is missing, damaged, or does not fit the others."""
    facts = load_facts(folder)
    arrays: dict[str, Array] = {}
    for name in ARRAYS:
        path = Path(folder) / f"{name}.npy"
        try:
            arrays[name] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise DataError(f"{path}: cannot be read ({error}); run medusa-export distill again") from error
    expected = {"tokens": "u", "offsets": "i", "answer": "u", "temperature": "f", "groups": "u"}
    for name, kind in expected.items():
        if arrays[name].dtype.kind != kind or arrays[name].ndim != 1:
            raise DataError(
                f"{folder}: {name}.npy is {arrays[name].dtype} of shape {arrays[name].shape}; damaged: "
                "run medusa-export distill again"
            )
    if len(arrays["answer"]) != (len(arrays["tokens"]) + 7) // 8:
        raise DataError(f"{folder}: answer.npy marks {8 * len(arrays['answer'])} tokens of {len(arrays['tokens'])}")
    arrays["answer"] = np.unpackbits(arrays["answer"], count=len(arrays["tokens"])).astype(bool)
    return DataSet(facts, **arrays)
