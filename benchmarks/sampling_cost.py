"""Measure what choosing one token costs on the host: milliseconds per row, on rows that a bundle's graph computes.

    python benchmarks/sampling_cost.py BUNDLE --precision int8 --rows 120

The rows are those of answers to benchmarks/demo_prompts.jsonl, drawn at temperature 1. Each case reads whole rows, as
on a CPU, and chooses one token from each; cases take turns row by row, so that all see the same load of the machine.
The table has the median and the 90th percentile. `--summaries` adds cases that read the 64 most likely tokens only, as
on a GPU, and how many rows they still read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import numpy as np
from medusa_runtime.backends.base import FloatArray, RowSummary, literal_step
from medusa_runtime.backends.ort_cpu import load
from medusa_runtime.bundle import Bundle
from medusa_runtime.prompt_encoder import PromptEncoder
from medusa_runtime.sampling import Sampler, token_logprobs
from medusa_runtime.sampling.ranking import top_ids
from medusa_runtime.sampling_params import SamplingParams
from medusa_runtime.threads import default_threads

PROMPTS = Path(__file__).with_name("demo_prompts.jsonl")
PER_PROMPT = 30  # rows of each answer
TEMPERATURES = (0.7, 1.0, 1.2)
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.1, "frequency_penalty": 0.3, "presence_penalty": 0.5}
LOGPROBS = 5
ENTRIES = 64  # of a summary


class RecordedRows:
    """Rows that were computed before, with summaries or without."""

    def __init__(self, rows: list[FloatArray], summaries: list[RowSummary] | None = None) -> None:
        """Keep the rows; `read` counts how often one was read."""
        self._rows, self._summaries, self.read = rows, summaries, 0

    def __call__(self, row: int, /) -> FloatArray:
        """Return a row."""
        self.read += 1
        return self._rows[row]

    def summary(self, row: int, /) -> RowSummary | None:
        """Return its summary."""
        return None if self._summaries is None else self._summaries[row]


def record(
    bundle: Bundle, precision: str, count: int, threads: int
) -> Iterator[tuple[list[int], list[int], FloatArray]]:
    """Yield (prompt, answer so far, row of logits) from answers drawn at temperature 1."""
    backend = load(bundle, bundle.model, "ort-cpu", precision, threads, 0)
    encoder, found = PromptEncoder(bundle, None), 0
    backend.allocate(1, 4096)
    for number, line in enumerate(PROMPTS.read_text().splitlines()):
        prompt = encoder.encode(json.loads(line)["turns"][0])
        sampler = Sampler(SamplingParams(temperature=1.0), prompt, bundle.model.vocab_size, (), (), number, 0)
        new, length, answer = prompt, 0, list[int]()
        for _ in range(PER_PROMPT):
            if found == count:
                return
            backend.run(literal_step(np.array(new, np.int32), length, np.array([len(new) - 1], np.int32)))
            backend.commit(0, range(len(new)), length)
            length += len(new)
            row = backend.read_logits(0).copy()
            yield prompt, list(answer), row
            found += 1
            answer.append(sampler.choose(RecordedRows([row]), 0, answer))
            new = answer[-1:]


def summary_of(row: FloatArray) -> RowSummary:
    """Return the summary that a graph on a GPU computes."""
    ids = top_ids(row, min(ENTRIES, len(row)))
    wide = row.astype(np.float64)
    logsumexp = float(wide.max() + np.log(np.exp(wide - wide.max()).sum()))
    return RowSummary(ids.astype(np.int32), row[ids], logsumexp, finite=True)


def cases() -> Iterator[tuple[str, SamplingParams]]:
    """Yield every measured request and its name."""
    for temperature in TEMPERATURES:
        make = partial(SamplingParams, temperature=temperature)
        name = f"temperature {temperature}"
        yield name, make()
        yield f"{name}, top_p 0.95", make(top_p=0.95)
        yield f"{name}, top_k 50", make(top_k=50)
        yield f"{name}, min_p 0.05", make(min_p=0.05)
        yield f"{name}, all filters", make(min_p=0.001, top_k=50, top_p=0.95)
        yield f"{name}, penalties", make(**PENALTIES)
        yield f"{name}, penalties and all filters", make(**PENALTIES, min_p=0.001, top_k=50, top_p=0.95)
    yield "greedy, penalties", SamplingParams(**PENALTIES)


def main() -> None:
    """Parse the command line, record rows, measure all cases in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="int8", help="Precision of the graph (default: %(default)s).")
    parser.add_argument("--rows", type=int, default=120, help="Number of rows (default: %(default)s).")
    parser.add_argument("--threads", type=int, default=default_threads(), help="Threads of the graph.")
    parser.add_argument("--summaries", action="store_true", help="Measure summaries of rows too.")
    options = parser.parse_args()
    recorded = list(record(Bundle.open(options.bundle), options.precision, options.rows, options.threads))
    rows = [row for _, _, row in recorded]
    readers = {"": RecordedRows(rows)}
    if options.summaries:
        readers[" (summary)"] = RecordedRows(rows, [summary_of(row) for row in rows])
    micros: dict[str, list[float]] = {}
    reads: dict[str, int] = {}
    for at, (prompt, answer, row) in enumerate(recorded):
        for suffix, reader in readers.items():
            for name, params in cases():
                sampler = Sampler(params, prompt, len(row), (), (), at, 0)
                sampler.choose(reader, at, answer[:-1])  # what a step before has left: counts of tokens, warm memory
                before, started = reader.read, perf_counter()
                sampler.choose(reader, at, answer)
                micros.setdefault(name + suffix, []).append((perf_counter() - started) * 1e6)
                reads[name + suffix] = reads.get(name + suffix, 0) + reader.read - before
            before, started = reader.read, perf_counter()
            token_logprobs(reader, at, int(row.argmax()), LOGPROBS)
            micros.setdefault(f"logprobs {LOGPROBS}{suffix}", []).append((perf_counter() - started) * 1e6)
            name = f"logprobs {LOGPROBS}{suffix}"
            reads[name] = reads.get(name, 0) + reader.read - before
    print(f"{options.bundle.name}: vocabulary of {len(rows[0])}, {len(rows)} rows")
    print(f"{'case':60} {'median':>8} {'90%':>8}  ms per row, rows read")
    for name, values in micros.items():
        print(f"{name:60} {median(values) / 1e3:8.3f} {quantiles(values, n=10)[-1] / 1e3:8.3f}  {reads[name]}")


if __name__ == "__main__":
    main()
