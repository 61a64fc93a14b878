"""Saves the reference's outputs of every step in a safetensors file, for a comparison in another process or machine.

The header's metadata has `format`, and under `reference` a JSON object with the backend, the model's shape, the tree
and the prompts. Each output of each step is a tensor, for example `00003/logits`. Polygraphy's own format is not used:
it keeps everything in one JSON text, and it decodes torch tensors with `torch.load`, which before torch 2.6 can run
code from the file.

Reading runs no code and trusts nothing: the model's shape is compared with the bundle's, tree and prompts are checked,
and the name, shape, type and size of each tensor are known before it is read.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_runtime import contract
from medusa_runtime.backends import BACKENDS
from medusa_runtime.backends.base import StepOutputs
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import MedusaError, MissingExtraError
from medusa_runtime.facts import HeadFacts, ModelFacts, state_size
from medusa_runtime.field_checks import check_int, check_object

from medusa_exporter.compare.steps import ComparisonPlan, StepInputs
from medusa_exporter.compare.tolerances import tolerance
from medusa_exporter.extras import import_extra
from medusa_exporter.files import atomic_write
from medusa_exporter.output_kinds import REFERENCE_FORMAT, SAVED_AS_ZIP

DTYPES = {np.dtype(np.float32): "F32", np.dtype(np.int32): "I32"}  # as safetensors names them
ALIGNMENT = 8  # bytes: the header is padded so that the tensors start at a multiple of it
REMEDY = "save it again with medusa-export compare … --save"


class ReferenceFileError(MedusaError):
    """A file is not a reference file, is damaged, or belongs to another model."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a backend and the precision of its graph."""

    backend: str
    precision: str

    def __str__(self) -> str:
        return f"{self.backend}:{self.precision}"


@contextmanager
def write_reference(file: Path, bundle: Bundle, side: Side, plan: ComparisonPlan) -> Iterator[ReferenceWriter]:
    """Write a reference file. It appears when the block ends; when the block raises, nothing is written.

    Args:
        file: The file to write.
        bundle: The bundle whose graph ran the steps.
        side: The backend and the precision that ran them.
        plan: Prompts, tree and number of steps.
    """
    content = {
        **asdict(side),
        **_shared_facts(bundle.model, bundle.heads),
        "tree": {"name": plan.tree.name, "paths": plan.tree.paths},
        "prompts": plan.prompts,
        "steps": plan.steps,
    }
    with atomic_write(file) as target, tempfile.TemporaryFile(dir=file.parent) as data:
        writer = ReferenceWriter(data)
        yield writer
        metadata = {"format": REFERENCE_FORMAT, "reference": json.dumps(content)}
        header = json.dumps({"__metadata__": metadata, **writer.entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % ALIGNMENT)
        target.write(len(header).to_bytes(8, "little") + header)
        data.seek(0)
        shutil.copyfileobj(data, target, 1 << 20)


class ReferenceWriter:
    """Appends the outputs of steps, in the order in which the steps run.

    safetensors' own `save_file` needs all tensors in memory at once, gigabytes for a large vocabulary, so the tensors
    are written step by step, and the header when all sizes are known.
    """

    def __init__(self, data: IO[bytes]) -> None:
        self._data, self._size = data, 0
        self.entries: dict[str, Any] = {}  # the tensors' part of the header
        self.steps = 0

    def add(self, outputs: StepOutputs) -> None:
        """Write all outputs of one step."""
        for name, array in outputs.items():
            begin, self._size = self._size, self._size + array.nbytes
            entry = {"dtype": DTYPES[array.dtype], "shape": array.shape, "data_offsets": (begin, self._size)}
            self.entries[_tensor_name(self.steps, name)] = entry
            self._data.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
        self.steps += 1


class ReferenceFile:
    """A reference file that was opened for one bundle: it serves as the reference (`steps.Reference`)."""

    def __init__(self, file: Path, tensors: Any, bundle: Bundle) -> None:
        """Check everything but the tensors; `open_reference` turns what this raises into a ReferenceFileError."""
        self._file, self._tensors, self._model = file, tensors, bundle.model
        self._state = state_size(bundle.model, bundle.heads)
        self._names = set(tensors.keys())
        metadata = tensors.metadata() or {}
        if (found := metadata.get("format")) != REFERENCE_FORMAT:
            raise ReferenceFileError(f"its format is {found!r:.80}, expected {REFERENCE_FORMAT!r}; {REMEDY}")
        content = check_object("its metadata", json.loads(metadata["reference"]))
        for part, facts in json.loads(json.dumps(_shared_facts(bundle.model, bundle.heads))).items():
            found_facts = check_object(part, content[part])
            for name, expected in facts.items():
                if (got := found_facts.get(name)) != expected:
                    raise ReferenceFileError(
                        f"it belongs to another model: {part}.{name} is {got!r:.80} there and {expected!r:.80} in "
                        f"{bundle.root}; use the bundle that it was saved with, or one of the same model and heads"
                    )
        self.side = Side(content["backend"], content["precision"])
        if self.side.backend not in BACKENDS:
            raise ReferenceFileError(
                f"its backend is {self.side.backend!r:.80}, expected one of {', '.join(BACKENDS)}; {REMEDY}"
            )
        tolerance(self.side.precision, self.side.precision)
        self.plan = _read_plan(content, bundle)
        self._steps = self._read = 0
        self.summary_error: float | None = None  # none are saved

    def run(self, inputs: StepInputs) -> StepOutputs:
        """Return the saved outputs of the next step.

        Raises:
            ReferenceFileError: The file does not have the outputs of such a step.
        """
        found = {}
        with _explained(self._file):
            for name, (shape, dtype) in self._expected(inputs).items():
                found[name] = self._tensor(_tensor_name(self._steps, name), shape, dtype)
            for name in (contract.TOKENS, contract.ARGMAX):
                if found[name].min() < 0 or found[name].max() >= self._model.vocab_size:
                    raise ReferenceFileError(f"{_tensor_name(self._steps, name)} has ids outside the vocabulary")
            literal = inputs.ids >= 0
            if (found[contract.TOKENS][0, literal] != inputs.ids[literal]).any():
                raise ReferenceFileError(
                    f"{_tensor_name(self._steps, contract.TOKENS)} differs from the tokens of that step"
                )
        self._steps, self._read = self._steps + 1, self._read + len(found)
        return found

    def commit(self, path: Sequence[int]) -> None:
        """Do nothing: the outputs of the later steps are already saved."""

    def finish(self) -> None:
        """Check that every tensor has been read.

        Raises:
            ReferenceFileError: The file has more tensors than its steps.
        """
        if len(self._names) != self._read:
            raise ReferenceFileError(
                f"{self._file} has {len(self._names)} tensors, expected {self._read} for its steps; {REMEDY}"
            )

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        """Read one tensor whose shape and type are known."""
        if name not in self._names:
            raise KeyError(name)
        found = self._tensors.get_slice(name)
        if (found_shape := tuple(found.get_shape())) != shape or found.get_dtype() != dtype:
            raise ReferenceFileError(
                f"{name} is {found.get_dtype()} of shape {found_shape}, expected {dtype} of shape {shape}"
            )
        return self._tensors.get_tensor(name)

    def _expected(self, inputs: StepInputs) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and type of each output of a step."""
        T, model = len(inputs.ids), self._model
        sizes = {"B": 1, "T": T, "R": T if inputs.kind == "tree" else 1}
        specs = contract.output_specs(model.layers, self._state, model.vocab_size, model.kv_row)
        return {
            spec.name: (
                tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape),
                "I32" if spec.dtype == "int32" else "F32",
            )
            for spec in specs
        }


@contextmanager
def open_reference(file: Path, bundle: Bundle) -> Iterator[ReferenceFile]:
    """Open a reference file for a bundle.

    Raises:
        ReferenceFileError: It is not a reference file of the bundle's model, in one sentence.
        MissingExtraError: safetensors is not installed.
    """
    safetensors = import_extra("safetensors", "export")
    with _explained(file):
        with file.open("rb") as start:
            if start.read(len(SAVED_AS_ZIP)) == SAVED_AS_ZIP:
                raise ReferenceFileError(f"it is a ZIP archive of an earlier version, expected safetensors; {REMEDY}")
        tensors = safetensors.safe_open(file, framework="numpy")
    with tensors:
        with _explained(file):
            reference = ReferenceFile(file, tensors, bundle)
        yield reference


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn whatever goes wrong with a file into a ReferenceFileError that names it."""
    try:
        yield
    except MissingExtraError:
        raise
    except (MedusaError, ProfileError) as error:
        raise ReferenceFileError(f"{file} cannot be used as a reference: {error}") from None
    except Exception as error:  # a damaged or hostile file can raise anything
        text = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ReferenceFileError(f"{file} is not a complete reference file: {text}; {REMEDY}") from None


def _shared_facts(model: ModelFacts, heads: HeadFacts) -> dict[str, dict[str, Any]]:
    """Return what both bundles must have in common: all but the model's name and the candidates of each head."""
    parts = {"model": asdict(model), "heads": asdict(heads)}
    del parts["model"]["name"], parts["heads"]["top_k"]
    return parts


def _tensor_name(step: int, output: str) -> str:
    return f"{step:05}/{output}"


def _read_plan(content: dict[str, Any], bundle: Bundle) -> ComparisonPlan:
    """Check tree, prompts and number of steps."""
    context = bundle.model.context
    tree = TreeProfile(content["tree"]["name"], content["tree"]["paths"])
    tree.check_fits(bundle.heads.count, bundle.heads.top_k)
    prompts = tuple(_read_prompt(ids, bundle.model.vocab_size, context) for ids in content["prompts"])
    check_int("steps", steps := content["steps"], 1, context)
    if not prompts:
        raise ReferenceFileError(f"it has no prompts; {REMEDY}")
    plan = ComparisonPlan(prompts, tree, steps, bundle.model.eos_token_ids)
    if plan.cache_rows > context:
        raise ReferenceFileError(f"its steps need {plan.cache_rows} tokens, the model's context is {context}")
    return plan


def _read_prompt(ids: object, vocabulary: int, context: int) -> tuple[int, ...]:
    """Check the token ids of one prompt."""
    if not isinstance(ids, list) or not 0 < len(ids) <= context:
        raise ReferenceFileError(f"a prompt is {ids!r:.80}, expected a list of 1 to {context} token ids")
    for token in ids:
        check_int("a token of a prompt", token, 0, vocabulary - 1)
    return tuple(ids)
