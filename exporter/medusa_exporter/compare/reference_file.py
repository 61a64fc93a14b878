"""A recording: what one backend gave at every step, in a file that another process, or another machine, compares with.

The file is a ZIP archive that keeps its entries as they are: `header.json`, and each step's outputs in turn as
`<step>/<name>.npy`, so that numpy's `load` opens it too. It is written and read step by step, for the outputs of one
tree are megabytes. Polygraphy's own format is not read: it holds all in one JSON text, and decodes a tensor of torch
by `torch.load`, which before torch 2.6 runs what a foreign file tells it to.

Reading runs no code, and believes nothing: facts are compared with the bundle's, trees and prompts checked, and of
each array name, shape, type and size are known before it is read.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_runtime import contract
from medusa_runtime.backends import BACKENDS
from medusa_runtime.backends.base import FloatArray, IntArray, StepOutputs
from medusa_runtime.bundle import Bundle
from medusa_runtime.checks import check_whole
from medusa_runtime.errors import MedusaError
from medusa_runtime.facts import HeadFacts, ModelFacts, state_size

from medusa_exporter.compare.steps import Plan, StepInputs
from medusa_exporter.compare.tolerances import tolerance
from medusa_exporter.files import atomic_write
from medusa_exporter.output_kinds import REFERENCE_FORMAT as FORMAT
from medusa_exporter.output_kinds import REFERENCE_HEADER as HEADER

SCHEMA = 1
MAX_HEADER = 16 << 20  # bytes
MAX_ARRAY_HEADER = 4096  # bytes that .npy may put before the numbers
STAMP = (1980, 1, 1, 0, 0, 0)  # of every entry: the same outputs are the same file
FLOAT, INT = np.dtype("<f4"), np.dtype("<i4")


class ReferenceFileError(MedusaError):
    """A file is no recording, is damaged, or was recorded with another bundle."""


@dataclass(frozen=True)
class Side:
    """Who ran the steps: a backend's name and the precision of its graph."""

    backend: str
    precision: str

    def __str__(self) -> str:
        return f"{self.backend}:{self.precision}"


@contextmanager
def write_reference(file: Path, bundle: Bundle, side: Side, plan: Plan) -> Iterator[ReferenceWriter]:
    """Write a recording; it appears when the block ends, and not at all when it raises."""
    content = {
        "format": FORMAT,
        "schema": SCHEMA,
        "backend": side.backend,
        "precision": side.precision,
        **_facts(bundle.model, bundle.heads),
        "tree": {"name": plan.tree.name, "paths": plan.tree.paths},
        "prompts": plan.prompts,
        "steps": plan.steps,
    }
    with atomic_write(file) as raw, zipfile.ZipFile(raw, "w") as archive:
        archive.writestr(zipfile.ZipInfo(HEADER, STAMP), json.dumps(content))
        yield ReferenceWriter(archive)


class ReferenceWriter:
    """Adds steps to a recording, in the order in which they are taken."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive, self.steps = archive, 0

    def add(self, outputs: StepOutputs) -> None:
        """Write all that one step gave."""
        for name, array in outputs.items():
            entry = zipfile.ZipInfo(_entry(self.steps, name), STAMP)
            with self._archive.open(entry, "w", force_zip64=True) as stream:
                little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
                np.lib.format.write_array(stream, little, allow_pickle=False)
        self.steps += 1


class ReferenceFile:
    """A recording opened for one bundle: the reference that others are compared with (`steps.Reference`)."""

    def __init__(self, file: Path, archive: zipfile.ZipFile, bundle: Bundle) -> None:
        """Check all but the outputs themselves; `open_reference` turns what this raises into a ReferenceFileError."""
        self._file, self._archive, self._model = file, archive, bundle.model
        self._state = state_size(bundle.model, bundle.heads)
        content = json.loads(_read(archive, HEADER, MAX_HEADER))
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("schema") != SCHEMA:
            raise ReferenceFileError(f"expected a header of {FORMAT!r}, schema {SCHEMA}")
        for part, facts in json.loads(json.dumps(_facts(bundle.model, bundle.heads))).items():
            for name, expected in facts.items():
                if (got := content[part].get(name)) != expected:
                    raise ReferenceFileError(
                        f"it is of another bundle: {part}.{name} is {got!r:.80} there and {expected!r:.80} in "
                        f"{bundle.root}; give the bundle that was recorded, or one built from the same model and heads"
                    )
        self.side = Side(content["backend"], content["precision"])
        if self.side.backend not in BACKENDS:
            raise ReferenceFileError(f"its backend is {self.side.backend!r:.80}, expected one of {', '.join(BACKENDS)}")
        tolerance(self.side.precision, self.side.precision)
        tree = TreeProfile(content["tree"]["name"], content["tree"]["paths"])
        tree.require(bundle.heads.count, bundle.heads.top_k)
        context = bundle.model.context
        prompts = tuple(_prompt(ids, bundle.model.vocab_size, context) for ids in content["prompts"])
        check_whole("steps", steps := content["steps"], 1, context)
        if not prompts:
            raise ReferenceFileError("it has no prompts")
        self.plan = Plan(prompts, tree, steps, bundle.model.eos_token_ids)
        if self.plan.rows > context:
            raise ReferenceFileError(f"its steps take {self.plan.rows} tokens, the model's context is {context}")
        self._taken, self._entries = 0, 1

    def take(self, place: StepInputs) -> StepOutputs:
        """Return what was recorded at the next step. Raises ReferenceFileError where it is not what that step gives."""
        found = {}
        with _explained(self._file):
            for name, (shape, dtype) in self._expected(place).items():
                found[name] = _read_array(self._archive, _entry(self._taken, name), shape, dtype)
            for name in (contract.TOKENS, contract.ARGMAX):
                if found[name].min() < 0 or found[name].max() >= self._model.vocab_size:
                    raise ReferenceFileError(f"{_entry(self._taken, name)} holds ids outside the vocabulary")
            literal = place.ids >= 0
            if (found[contract.TOKENS][0, literal] != place.ids[literal]).any():
                raise ReferenceFileError(
                    f"{_entry(self._taken, contract.TOKENS)} holds other tokens than the step was given"
                )
        self._taken, self._entries = self._taken + 1, self._entries + len(found)
        return found

    def keep(self, path: Sequence[int]) -> None:
        """Nothing to do: what was kept shows in the steps behind."""

    def finish(self) -> None:
        """Raise ReferenceFileError unless every entry has been read."""
        if (count := len(self._archive.namelist())) != self._entries:
            raise ReferenceFileError(
                f"{self._file} holds {count} entries, expected {self._entries} for its steps; record again"
            )

    def _expected(self, place: StepInputs) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of each output of a step."""
        T, model = len(place.ids), self._model
        R = T if place.kind == "tree" else 1
        sizes = {"B": 1, "T": T, "R": R}
        specs = contract.output_specs(model.layers, self._state, model.vocab_size, model.kv_row)
        return {
            spec.name: (
                tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape),
                INT if spec.dtype == "int32" else FLOAT,
            )
            for spec in specs
        }


@contextmanager
def open_reference(file: Path, bundle: Bundle) -> Iterator[ReferenceFile]:
    """Open a recording for `bundle`. Raises ReferenceFileError in one sentence for all that it cannot be."""
    with _explained(file):
        archive = zipfile.ZipFile(file)
    with archive:
        with _explained(file):
            recording = ReferenceFile(file, archive, bundle)
        yield recording


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn whatever goes wrong with a file into a ReferenceFileError that names it."""
    try:
        yield
    except (MedusaError, ProfileError) as error:
        raise ReferenceFileError(f"{file} cannot be compared with: {error}") from None
    except Exception as error:  # a foreign file may raise anything
        text = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ReferenceFileError(
            f"{file} is no whole recording: {text}; record again with medusa-export compare … --save"
        ) from None


def _facts(model: ModelFacts, heads: HeadFacts) -> dict[str, dict[str, Any]]:
    """What two bundles must have in common: not the model's name, nor how many candidates their trees may ask for."""
    parts = {"model": asdict(model), "heads": asdict(heads)}
    del parts["model"]["name"], parts["heads"]["top_k"]
    return parts


def _entry(step: int, name: str) -> str:
    return f"{step:05}/{name}.npy"


def _read(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """Read one entry of `limit` bytes at most; compressed ones, which may grow beyond all bounds, are refused."""
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise ReferenceFileError(f"it lacks {name}") from None
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > limit:
        raise ReferenceFileError(
            f"{name} is compressed or has {entry.file_size} bytes, expected {limit} at most, as they are"
        )
    return archive.read(entry)


def _read_array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> FloatArray | IntArray:
    """Read one array of a known shape and type."""
    size = int(np.prod(shape)) * dtype.itemsize
    stream = io.BytesIO(_read(archive, name, size + MAX_ARRAY_HEADER))
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ReferenceFileError(f"{name} is of another version of .npy, expected 1.0")
    found = np.lib.format.read_array_header_1_0(stream)
    if found != (shape, False, dtype):
        raise ReferenceFileError(f"{name} is {found[2]} of shape {found[0]}, expected {dtype} of shape {shape}")
    array: FloatArray | IntArray = np.frombuffer(stream.read(), dtype).reshape(shape)
    return array


def _prompt(ids: object, vocabulary: int, context: int) -> tuple[int, ...]:
    """Check one prompt's token ids."""
    if not isinstance(ids, list) or not 0 < len(ids) <= context:
        raise ReferenceFileError(f"a prompt is {ids!r:.80}, expected a list of 1 to {context} token ids")
    for token in ids:
        check_whole("a token of a prompt", token, 0, vocabulary - 1)
    return tuple(ids)
