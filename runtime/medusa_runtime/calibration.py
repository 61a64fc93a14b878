"""Calibrations: how long a graph's steps take on a machine, and how well its heads predict, as measured by `calibrate`.

The file is JSON. What it claims is checked before it is believed: sizes, ranges, and that every number is finite.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from medusa_profiles.profile import MAX_NODES, MAX_RANK
from numpy.typing import NDArray

from medusa_runtime.errors import BundleError, CalibrationError
from medusa_runtime.facts import DIGEST
from medusa_runtime.field_checks import (
    check_fields,
    check_int,
    check_keys,
    check_list,
    check_number,
    check_object,
    check_text,
    refuse,
)
from medusa_runtime.strict_json import parse_json

SCHEMA = 1
MAX_BYTES = 32 << 20
MAX_HEADS = 1000
MAX_LENGTH = 2**31 - 1  # tokens of a past
MAX_MS = 1e7  # milliseconds of a step
REMEDY = "measure again: medusa-export calibrate BUNDLE"

Hits = NDArray[np.int16]


@dataclass(frozen=True)
class Machine:
    """What the time of a step depends on besides the graph.

    Attributes:
        device: Name of the processor or GPU.
        threads: CPU threads that run the steps; 0 on a GPU.
        driver: Version of the GPU's driver; "none" on a CPU.
        library: Library that runs the graph, with its version.
        medusa_export: Version of medusa-export.
    """

    device: str
    threads: int
    driver: str
    library: str
    medusa_export: str

    def __post_init__(self) -> None:
        for name in ("device", "driver", "library", "medusa_export"):
            check_text(f"machine.{name}", getattr(self, name))
        check_int("machine.threads", self.threads, 0, 2**16)

    def __str__(self) -> str:
        """Return the device and, on a CPU, the number of threads."""
        return f"{self.device}, {self.threads} threads" if self.threads else self.device


@dataclass(frozen=True)
class StepTime:
    """The time of steps of one size behind a past of one length, everything included that decoding does in a step.

    Attributes:
        batch: Sequences of the step.
        nodes: Nodes of the tree, T; 1 is plain decoding, for which the heads do not run.
        past: Tokens of the past.
        ms: Median time in milliseconds.
        spread_ms: Difference between the third and the first quartile, in milliseconds.
        runs: Number of steps that were timed.
    """

    batch: int
    nodes: int
    past: int
    ms: float
    spread_ms: float
    runs: int

    def __post_init__(self) -> None:
        check_int("a step's batch", self.batch, 1, 2**16)
        check_int("a step's nodes", self.nodes, 1, MAX_NODES)
        check_int("a step's past", self.past, 0, MAX_LENGTH)
        check_number("a step's ms", self.ms, 1e-6, MAX_MS)
        check_number("a step's spread_ms", self.spread_ms, 0, MAX_MS)
        check_int("a step's runs", self.runs, 1, MAX_LENGTH)


@dataclass(frozen=True)
class AnswerHits:
    """How the heads ranked the tokens of one answer of greedy decoding.

    Attributes:
        conversation: Number of the conversation, from 1.
        check: Whether it belongs to the half that trees are checked on; they are fitted on the other one.
        hits: (S, K) int16, the format of `medusa_profiles.simulation`: S places in the order of the answer at which a
            step may start, and for each head the rank of the token that followed; -1 if it was not recorded.
    """

    conversation: int
    check: bool
    hits: Hits


@dataclass(frozen=True)
class Acceptance:
    """How well the heads predict what the decoder writes.

    Attributes:
        ranks: Number of candidates of each head that were recorded, from the most likely one on.
        past: Mean number of tokens of the past of a step.
        answers: The answers.
    """

    ranks: tuple[int, ...]
    past: float
    answers: tuple[AnswerHits, ...]

    def __post_init__(self) -> None:
        _check_ranks(list(self.ranks))
        check_number("acceptance.past", self.past, 0, MAX_LENGTH)
        if not self.answers:
            refuse("acceptance.answers", self.answers, "at least one answer")

    def samples(self, *, check: bool | None = None) -> tuple[Hits, NDArray[np.int32]]:
        """Return the hits (S, K) of all answers and the number of each sample's answer (S,).

        Args:
            check: Only the half to check on, or only the one to fit on; None is both.
        """
        chosen = [answer.hits for answer in self.answers if check is None or answer.check is check]
        hits = np.concatenate([np.zeros((0, len(self.ranks)), np.int16), *chosen])
        return hits, np.repeat(np.arange(len(chosen), dtype=np.int32), [len(one) for one in chosen])


@dataclass(frozen=True)
class GraphCalibration:
    """What was measured of one graph of a bundle on one machine.

    Attributes:
        bundle: Digest of the bundle's manifest.
        graph: Key of the graph in the manifest.
        machine: Where it was measured.
        steps: Times of steps: every size of a batch behind every length of the past, plain decoding among them.
        acceptance: How well the heads predict; None if no prompts were given.

    Raises:
        BundleError: A field is invalid.
    """

    bundle: str
    graph: str
    machine: Machine
    steps: tuple[StepTime, ...]
    acceptance: Acceptance | None = None
    _times: NDArray[np.float64] = field(init=False, repr=False, compare=False)  # (sizes, pasts) of batch 1

    def __post_init__(self) -> None:
        check_text("bundle", self.bundle, DIGEST)
        check_text("graph", self.graph)
        cells = {(step.batch, step.nodes, step.past): step.ms for step in self.steps}
        expected = {
            (1, nodes, past)
            for nodes in {1, *(step.nodes for step in self.steps if step.batch == 1)}
            for past in {step.past for step in self.steps if step.batch == 1}
        }
        alone = {cell for cell in cells if cell[0] == 1}
        if not alone or alone != expected or len(cells) != len(self.steps):
            refuse("steps", f"{len(self.steps)} times", "one for each size, 1 included, behind each length of the past")
        times = [[cells[1, nodes, past] for past in self.pasts] for nodes in self.sizes]
        object.__setattr__(self, "_times", np.array(times))

    @property
    def precision(self) -> str:
        """The precision of the graph."""
        return self.graph.rpartition("-")[2]

    @property
    def sizes(self) -> list[int]:
        """The measured numbers of nodes of a single sequence, ascending; 1 is the first."""
        return sorted({step.nodes for step in self.steps if step.batch == 1})

    @property
    def pasts(self) -> list[int]:
        """The measured lengths of the past of a single sequence, ascending."""
        return sorted({step.past for step in self.steps if step.batch == 1})

    def step_ms(self, nodes: int, past: float) -> float | None:
        """Return the time of a step in milliseconds, interpolated linearly between the nearest sizes and lengths.

        Args:
            nodes: Nodes of the tree; 1 is plain decoding.
            past: Tokens of the past; beyond the measured lengths it is the nearest one's time.

        Returns:
            None for more nodes than were measured: `calibrate` leaves out sizes that no acceptance can pay for.
        """
        sizes = self.sizes
        if nodes > sizes[-1]:
            return None
        behind = [float(np.interp(past, self.pasts, row)) for row in self._times]
        trees = slice(1, None) if nodes > 1 else slice(None)  # a tree's step runs the heads, which a plain one does not
        return float(np.interp(nodes, sizes[trees], behind[trees]))

    def to_json(self) -> dict[str, Any]:
        """Return JSON values that `read_calibrations` accepts as one of the graphs of a file."""
        return {
            "bundle": self.bundle,
            "graph": self.graph,
            "machine": asdict(self.machine),
            "steps": [asdict(step) for step in self.steps],
            "acceptance": None if self.acceptance is None else _acceptance_to_json(self.acceptance),
        }


def to_document(graphs: Iterable[GraphCalibration]) -> dict[str, Any]:
    """Return the content of a calibration file."""
    return {"schema": SCHEMA, "graphs": [graph.to_json() for graph in graphs]}


def read_calibrations(file: Path) -> list[GraphCalibration]:
    """Read a calibration file, with one or more graphs. Raises CalibrationError if it is missing or damaged."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise CalibrationError(f"the calibration {file} cannot be read: {error.strerror or error}; {REMEDY}") from None
    try:
        content = dict(check_object("the file", parse_json("the file", data, MAX_BYTES)))
        content.pop("made_by", None)
        if (schema := content.get("schema")) != SCHEMA or isinstance(schema, bool):
            refuse("schema", schema, str(SCHEMA))
        check_keys("the file", content, {"schema", "graphs"})
        return [_graph(graph) for graph in check_list("graphs", content["graphs"], 1000)]
    except BundleError as error:
        raise CalibrationError(f"{file} is not a valid calibration: {error}; {REMEDY}") from None


def _graph(value: object) -> GraphCalibration:
    content = check_object("a graph", value)
    check_keys("a graph", content, {"bundle", "graph", "machine", "steps", "acceptance"})
    machine = check_fields("machine", content["machine"], Machine)
    steps = [check_fields("a step", step, StepTime) for step in check_list("steps", content["steps"], 100_000)]
    acceptance = None if content["acceptance"] is None else _acceptance(content["acceptance"])
    return GraphCalibration(
        content["bundle"], content["graph"], Machine(**machine), tuple(StepTime(**step) for step in steps), acceptance
    )


def _acceptance(value: object) -> Acceptance:
    content = check_object("acceptance", value)
    check_keys("acceptance", content, {"ranks", "past", "answers"})
    ranks = _check_ranks(content["ranks"])
    answers = tuple(_answer(answer, ranks) for answer in check_list("answers", content["answers"], MAX_BYTES))
    return Acceptance(ranks, content["past"], answers)


def _check_ranks(value: object) -> tuple[int, ...]:
    ranks = check_list("acceptance.ranks", value, MAX_HEADS)
    for count in ranks:
        check_int("a number in acceptance.ranks", count, 1, MAX_RANK + 1)
    return tuple(ranks)


def _answer(value: object, ranks: tuple[int, ...]) -> AnswerHits:
    content = check_object("an answer", value)
    check_keys("an answer", content, {"conversation", "check", "hits"})
    check_int("an answer's conversation", content["conversation"], 1, MAX_LENGTH)
    if not isinstance(content["check"], bool):
        refuse("an answer's check", content["check"], "true or false")
    flat = check_list("an answer's hits", content["hits"], MAX_BYTES)
    if len(flat) % len(ranks):
        refuse("the number of an answer's hits", len(flat), f"a multiple of the {len(ranks)} heads")
    for position, rank in enumerate(flat):
        check_int("a hit", rank, -1, ranks[position % len(ranks)] - 1)
    hits = np.array(flat, np.int16).reshape(-1, len(ranks))
    return AnswerHits(content["conversation"], content["check"], hits)


def _acceptance_to_json(acceptance: Acceptance) -> dict[str, Any]:
    return {
        "ranks": list(acceptance.ranks),
        "past": acceptance.past,
        "answers": [
            {"conversation": one.conversation, "check": one.check, "hits": one.hits.ravel().tolist()}
            for one in acceptance.answers
        ],
    }
