"""Compare decoding speed with onnxruntime-genai, llama.cpp and OpenVINO GenAI on the same weights, prompts and threads.

Each system runs in a separate process, and the systems answer every prompt in turns, for several rounds: the speed of a
machine changes over time, and two inference sessions in one process slow each other down. See README.md for the method.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from medusa_exporter.overwrite_check import OverwriteError, check_output_file
from medusa_runtime.errors import MedusaError
from peers_contenders import BACKEND, OWN_CLASSES, Contender, own_contenders, peer_contenders, select
from peers_process import measure_in_turns
from peers_prompts import prefill_prompts, read_prompts
from peers_report import PLOT, PLOT_TYPES, plot, print_tables
from peers_results import OUTPUT, Results, ResultsError, token_rate

if TYPE_CHECKING:
    from medusa_runtime.bundle import Bundle

HERE = Path(__file__).resolve().parent
WARM_UP_TOKENS = 24
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
MODEL_FILES = (".onnx", ".onnx.data", ".gguf", "openvino_model.xml", "openvino_model.bin")
UNFINISHED = 3  # exit code: --minutes are over, and the same command continues


def machine() -> dict[str, Any]:
    """Describe the machine."""
    from medusa_runtime.threads import physical_cores

    file = Path("/proc/cpuinfo")
    facts = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line) if file.is_file() else {}
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    return {
        "processor": facts.get("model name") or platform.processor() or platform.machine(),
        "features": [name for name in FEATURES if name in facts.get("flags", "").split()],
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def make_models(arguments: argparse.Namespace, peers: list[Contender]) -> dict[str, str]:
    """Create the peers' models from the same weights, in a new process; return their paths."""
    job = {
        "model": arguments.model,
        "cache": str(arguments.cache),
        "python": arguments.peer_python,
        "models": list(dict.fromkeys(peer.job["model"] for peer in peers)),
    }
    make = [sys.executable, str(HERE / "peers_model.py")]
    built = subprocess.run(make, input=json.dumps(job), check=False, stdout=subprocess.PIPE, text=True)
    if built.returncode:
        raise SystemExit("the peers' models could not be created; the messages above have the reason")
    models: dict[str, str] = json.loads(built.stdout.strip().splitlines()[-1])
    return models


def with_models(
    tested: list[Contender], sizes: dict[str, int], models: dict[str, str]
) -> list[tuple[Contender, dict[str, Any], list[Path]]]:
    """Return the contenders, peers with the paths of their models, each with its facts and the files of its model.

    Args:
        tested: The contenders; the job of a peer has the name of its model.
        sizes: Bytes of our builds, by the name of plain decoding.
        models: Paths of the peers' models.
    """
    found = []
    for one in tested:
        if one.own:
            ready, files = one, sorted(Path(one.job["model"]).glob("graphs/*"))
            size = sizes[one.plain or one.name]
        else:
            path = Path(models[one.job["model"]])
            ready = replace(one, job=one.job | {"model": str(path)})
            files = [path] if path.is_file() else [file for file in path.iterdir() if file.name.endswith(MODEL_FILES)]
            size = sum(file.stat().st_size for file in files)
        found.append((ready, ready.facts() | {"model_bytes": size}, files))
    return found


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; exit with an error for values that do not fit together."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--bundle", type=Path, action="append", required=True, help="Bundle folder; may be repeated.")
    add("--model", required=True, help="Model that the bundle was built from: a .gguf file.")
    add("--prompts", type=Path, required=True, help="JSON Lines file; each line has a list of texts under 'turns'.")
    add("--limit", type=int, default=12, help="Maximum number of prompts (default: %(default)s).")
    add("--max-new-tokens", type=int, default=128, help="Tokens per answer (default: %(default)s).")
    add("--threads", type=int, help="Threads of every system (default: one per physical core).")
    add("--rounds", type=int, default=3, help="Number of rounds (default: %(default)s).")
    add("--minutes", type=float, help="Start no measurement after so many minutes; the same command continues.")
    add("--apart", action="store_true", help="Only one system in memory: each answers all prompts before the next.")
    add(
        "--attempts",
        type=int,
        default=1,
        help="Largest number of attempts for an answer that other processes disturb (default: %(default)s).",
    )
    add(
        "--precision",
        action="append",
        choices=list(OWN_CLASSES),
        help="Precision of the bundles to measure; may be repeated (default: all).",
    )
    add(
        "--profile",
        action="append",
        default=[],
        help="Tree to measure, NAME or PRECISION:NAME: one of the bundle, 'default', or a .toml file; may be repeated.",
    )
    add("--draft", type=int, action="append", help="Drafted tokens of the peers' n-gram speculation (default: 3).")
    add("--prefill", type=int, action="append", help="Length of a prompt to prefill (default: 64, 256 and 1024).")
    add("--only", action="append", default=[], help="Systems to measure: a pattern of their names. May be repeated.")
    add("--cache", type=Path, default=Path(".cache/peers"), help="Folder for the peers' models (default: %(default)s).")
    add("--peer-python", default=sys.executable, help="Python interpreter in which the peers are installed.")
    add("--json", type=Path, required=True, help="File for all results; results that it has already are kept.")
    add("--plot", type=Path, help="File for a plot of tokens per second (.svg or .png).")
    arguments = parser.parse_args()
    arguments.prefill = list(dict.fromkeys(arguments.prefill or [64, 256, 1024]))
    arguments.draft = list(dict.fromkeys(arguments.draft or [3]))
    numbers = [arguments.rounds, arguments.limit, arguments.attempts, arguments.max_new_tokens - 1]
    if min(*numbers, *arguments.prefill, *arguments.draft) < 1:
        parser.error("numbers must be at least 1, --max-new-tokens at least 2")
    if not arguments.model.endswith(".gguf"):
        parser.error(f"--model {arguments.model}: expected a .gguf file, from which llama.cpp's models can be created")
    inputs = [arguments.prompts]
    try:
        for bundle in arguments.bundle:
            check_output_file(arguments.json, OUTPUT, inputs=inputs, bundle=bundle)
            if arguments.plot:
                if arguments.plot.suffix not in PLOT_TYPES:
                    parser.error(f"--plot {arguments.plot}: expected a name that ends in {' or '.join(PLOT_TYPES)}")
                check_output_file(arguments.plot, PLOT, inputs=[*inputs, arguments.json], bundle=bundle)
    except OverwriteError as error:
        parser.error(str(error))
    return arguments


def find_contenders(arguments: argparse.Namespace, bundles: list[Bundle]) -> tuple[list[Contender], dict[str, int]]:
    """Return the systems to measure, and the size in bytes of each of our builds by the name of its plain decoding."""
    from medusa_exporter.graph_sizes import graph_sizes

    found: list[Contender] = []
    sizes: dict[str, int] = {}
    for number, bundle in enumerate(bundles, start=1):
        label = f"[{number}]" if number > 1 else ""
        has = [facts.precision for facts in bundle.manifest.graphs.values() if facts.backend == BACKEND]
        precisions = [name for name in arguments.precision or has if name in has]
        found += own_contenders(bundle, label, precisions, arguments.profile, amx="amx_int8" in machine()["features"])
        stored = graph_sizes(bundle)
        sizes |= {f"medusa{label} {name}": stored[f"{BACKEND}-{name}"].size for name in precisions}
    return select([*found, *peer_contenders(arguments.draft)], arguments.only), sizes


def measure_all(
    arguments: argparse.Namespace,
    results: Results,
    systems: list[tuple[Contender, dict[str, Any], list[Path]]],
    common: dict[str, Any],
    deadline: float,
) -> int:
    """Measure what the results do not have yet, and save after each measurement; return how many are left.

    Args:
        arguments: The command line.
        results: Receives the reports.
        systems: The contenders, each with its facts and the files of its model.
        common: What the jobs of all workers have in common.
        deadline: No measurement starts after this time of the monotonic clock.
    """
    left = sum(not results.has(facts, number) for _, facts, _ in systems for number in range(arguments.rounds))
    for number in range(arguments.rounds):
        todo = [system for system in systems if not results.has(system[1], number)]
        todo = todo if number % 2 == 0 else todo[::-1]
        together = {"together": uuid.uuid4().hex}  # only what was measured together is compared
        for group in [[one] for one in todo] if arguments.apart else [todo]:
            if time.monotonic() >= deadline:
                return left
            opened = [(system, files) for system, _facts, files in group]
            reports = measure_in_turns(opened, arguments.peer_python, common)
            for (system, facts, _), report in zip(group, reports, strict=True):
                results.add(facts, number, together | report)
                print(f"round {number + 1}: {system.name}: {token_rate(report):.1f} tokens/s", file=sys.stderr)
            results.save(arguments.json)
            left -= len(group)
    return left


def main() -> int:
    """Parse the command line, measure what has not been measured yet, report."""
    started = time.monotonic()
    arguments = parse_arguments()

    from medusa_runtime.bundle import Bundle

    try:
        bundles = [Bundle.open(folder) for folder in arguments.bundle]
        tested, sizes = find_contenders(arguments, bundles)
    except (MedusaError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    try:
        prompts = read_prompts(arguments.prompts, arguments.limit, bundles[0])
    except (MedusaError, OSError, ValueError, KeyError) as error:
        raise SystemExit(
            f"{arguments.prompts} cannot be read: {error!r:.300}; expected JSON Lines with turns"
        ) from error
    facts = machine()
    common = {
        "prompts": prompts,
        "prefills": prefill_prompts(prompts, arguments.prefill),
        "max_new_tokens": arguments.max_new_tokens,
        "warm_up_tokens": min(WARM_UP_TOKENS, arguments.max_new_tokens),
        "threads": arguments.threads or facts["physical_cores"],
        "context": max(*map(len, prompts), *arguments.prefill) + arguments.max_new_tokens,
        "attempts": arguments.attempts,
    }
    settings = {name: value for name, value in common.items() if name not in ("prompts", "prefills")}
    settings["apart"] = arguments.apart
    settings |= {"prompts": len(prompts), "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}
    settings |= {"prefill": arguments.prefill}
    systems = with_models(tested, sizes, make_models(arguments, [one for one in tested if not one.own]))
    deadline = started + 60 * arguments.minutes if arguments.minutes is not None else math.inf
    lock = FileLock(f"{arguments.json}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SystemExit(f"another run is measuring into {arguments.json}; wait for it, or end it") from None
    try:
        results = Results.load(arguments.json, {"machine": facts, "settings": settings})
        rest = measure_all(arguments, results, systems, common, deadline)
    except ResultsError as error:
        raise SystemExit(str(error)) from error
    finally:
        lock.release()
    print_tables(results, arguments.prefill, frozenset(bundles[0].model.eos_token_ids))
    if arguments.plot:
        plot(results, arguments.plot)
    if rest:
        print(f"{rest} measurements are left: repeat the command to continue", file=sys.stderr)
    return UNFINISHED if rest else 0


if __name__ == "__main__":
    sys.exit(main())
