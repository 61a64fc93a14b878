"""Measure what a step of several rows costs, with ONNX Runtime on our graph and with OpenVINO on the same decoder.

    python benchmarks/openvino_steps.py BUNDLE --precision w8a8 --openvino FOLDER --peer-python peers/bin/python

FOLDER is a model from `optimum-cli export openvino`, as peers.py keeps them in its cache. Both programs run chains of
random tokens behind a past, in turns, each in a process of its own; ours without heads, OpenVINO without the mask of a
tree, which its models do not take. So the comparison shows what another backend could bring at best.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers_process import exchange

RUNS, WARM_UPS = 12, 2
Steps = Callable[[int, int], list[float]]  # milliseconds of RUNS steps with a number of rows, behind a past


def open_medusa(options: dict[str, Any]) -> Steps:
    """Open the graph of a bundle."""
    from medusa_runtime.backends.ort_cpu import load
    from medusa_runtime.bundle import Bundle
    from step_operators import random_step

    bundle = Bundle.open(options["bundle"])
    backend = load(bundle, bundle.model, "ort-cpu", options["precision"], options["threads"], 0)

    def steps(rows: int, past: int) -> list[float]:
        step = random_step(backend, rows, past, draft=False)
        return [timed(lambda: backend.run(step)) for _ in range(WARM_UPS + RUNS)][WARM_UPS:]

    return steps


def open_openvino(options: dict[str, Any]) -> Steps:
    """Open a model of optimum-intel; its past grows with each step, so that it has the wanted length halfway."""
    import numpy as np

    try:
        import openvino
    except ImportError as error:
        raise SystemExit("openvino is not installed for this Python: name one that has it, --peer-python") from error

    settings = {"INFERENCE_NUM_THREADS": options["threads"], "PERFORMANCE_HINT": "LATENCY"}
    if options["hint"]:
        settings["INFERENCE_PRECISION_HINT"] = options["hint"]
    model = openvino.Core().compile_model(f"{options['openvino']}/openvino_model.xml", "CPU", settings)
    request, random = model.create_infer_request(), np.random.default_rng(0)

    def feed(rows: int, past: int) -> None:
        request.infer(
            {
                "input_ids": random.integers(0, 1000, (1, rows)),
                "attention_mask": np.ones((1, past + rows), dtype=np.int64),
                "position_ids": np.arange(past, past + rows)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )

    def steps(rows: int, past: int) -> list[float]:
        begin = max(1, past - rows * (WARM_UPS + RUNS) // 2)
        request.reset_state()
        feed(begin, 0)
        pasts = range(begin, begin + rows * (WARM_UPS + RUNS), rows)
        return [timed(lambda at=at: feed(rows, at)) for at in pasts][WARM_UPS:]  # type: ignore[misc]

    return steps


def timed(run: Callable[[], None]) -> float:
    """Return the milliseconds of a call."""
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def work() -> None:
    """In a worker: open what the first line of standard input says, and time the steps that the others ask for."""
    options = json.loads(input())
    steps = {"medusa": open_medusa, "openvino": open_openvino}[options["system"]](options)
    print(json.dumps(None), flush=True)
    for line in sys.stdin:
        print(json.dumps(steps(*json.loads(line))), flush=True)


class Worker:
    """One of the programs in a process of its own."""

    def __init__(self, python: str, options: dict[str, Any]) -> None:
        """Start the process and wait until the model is loaded."""
        self._process = subprocess.Popen(
            [python, __file__, "--work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask(options)

    def ask(self, request: Any) -> Any:
        """Return the answer to a request."""
        if not (answer := exchange(self._process, request)):
            raise SystemExit(f"a worker ended with exit code {self._process.wait()}; its messages are above")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def main() -> None:
    """Parse the command line, measure in turns, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="w8a8", help="Precision of our graph (default: %(default)s).")
    parser.add_argument("--openvino", type=Path, required=True, help="Folder of OpenVINO's model.")
    parser.add_argument("--peer-python", default=sys.executable, help="Python interpreter that has openvino.")
    parser.add_argument("--hint", help="OpenVINO's INFERENCE_PRECISION_HINT (default: its own choice).")
    parser.add_argument("--rows", default="1,2,4,8,16", help="Comma-separated numbers of rows of a step.")
    parser.add_argument("--past", type=int, default=256, help="Tokens before a step (default: %(default)s).")
    parser.add_argument("--threads", type=int, default=2, help="Threads of each program (default: %(default)s).")
    parser.add_argument("--rounds", type=int, default=6, help="Number of rounds (default: %(default)s).")
    options = parser.parse_args()
    common = {"threads": options.threads, "hint": options.hint, "precision": options.precision}
    ours = Worker(sys.executable, common | {"system": "medusa", "bundle": str(options.bundle)})
    theirs = Worker(options.peer_python, common | {"system": "openvino", "openvino": str(options.openvino)})
    found: dict[int, list[tuple[float, float]]] = {int(rows): [] for rows in options.rows.split(",")}
    for number in range(options.rounds):
        turns = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        for rows, pairs in found.items():
            medians = {one: statistics.median(one.ask([rows, options.past])) for one in turns}
            pairs.append((medians[ours], medians[theirs]))
    ours.close()
    theirs.close()
    print("| rows | ours, ms | OpenVINO, ms | ours ÷ OpenVINO, median (and range) of the rounds |")
    print("| --- | --- | --- | --- |")
    for rows, pairs in found.items():
        ratios = [mine / other for mine, other in pairs]
        mine, other, ratio = (statistics.median(values) for values in (*zip(*pairs, strict=True), ratios))
        print(f"| {rows} | {mine:.1f} | {other:.1f} | {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        main()
