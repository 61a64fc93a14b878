"""Compare decoding speed with onnxruntime-genai and llama.cpp, on the same weights, prompts, tokens and threads.

Each system runs in a separate process, and the systems alternate for several rounds: the speed of a machine changes
over time, and two inference sessions in one process slow each other down. See README.md for the method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from medusa_exporter.files import write_json
from medusa_exporter.overwrite_check import JsonKind, OverwriteError, check_output_file
from peers_report import (
    EXTRA,
    GENAI,
    LLAMA,
    PLAIN,
    PLOT,
    PLOT_TYPES,
    Contender,
    plot,
    print_table,
    step_ms,
    summarise,
    token_rate,
)

HERE = Path(__file__).resolve().parent
OUTPUT = JsonKind("benchmarks/peers.py", frozenset({"machine", "settings", "precisions"}))
WARM_UP_TOKENS = 24
LLAMA_TYPES = {"fp32": ("F32", EXTRA), "int8": ("Q8_0",), "w8a8": ("Q8_0",), "int4": ("Q4_0",)}
GENAI_TYPES = {"fp32": "fp32", "int8": "int8", "w8a8": "int8", "int4": "int4"}


def measure(system: Contender, common: dict[str, Any]) -> None:
    """Run a system's worker once in a new process, and add its report."""
    done = subprocess.run(
        [system.python, str(HERE / "peers_worker.py")],
        input=json.dumps(common | system.job),
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"the worker of {system.name} failed:\n{done.stderr[-3000:]}")
    system.reports.append(json.loads(done.stdout))


def read_prompts(file: Path, limit: int, bundle: Any) -> list[list[int]]:
    """Return the token ids of each first turn, by the bundle's chat template or, without one, of the plain text."""
    from medusa_runtime.chat_template import ChatTemplate
    from medusa_runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(bundle.tokenizer, str(bundle.root))
    template = ChatTemplate(bundle.chat_template, bundle.special_tokens) if bundle.chat_template else None
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    turns = [json.loads(line)["turns"][0] for line in lines[:limit]]
    if not turns:
        raise SystemExit(f"{file} has no prompts: expected JSON lines with a list of texts under 'turns'")
    if template is not None:
        turns = [template.render([{"role": "user", "content": turn}]) for turn in turns]
    return [tokenizer.encode(turn, add_special_tokens=template is None) for turn in turns]


def machine() -> dict[str, Any]:
    """Describe the machine."""
    from medusa_runtime.threads import physical_cores

    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def contenders(arguments: argparse.Namespace, precision: str, models: dict[str, str]) -> list[Contender]:
    """Return the systems to measure in one precision; the first is this project's plain decoding."""
    ours = {"system": "medusa", "bundle": str(arguments.bundle), "backend": "ort-cpu", "precision": precision}
    genai = models[f"{GENAI} {GENAI_TYPES[precision]}"]
    llama = [(name, models[f"{LLAMA} {name}"]) for name in LLAMA_TYPES[precision] if f"{LLAMA} {name}" in models]
    return [
        Contender(PLAIN, sys.executable, ours | {"profile": None}),
        Contender(GENAI, arguments.peer_python, {"system": "genai", "model": genai}),
        *(
            Contender(f"{LLAMA} {name}", arguments.peer_python, {"system": "llama.cpp", "model": file})
            for name, file in llama
        ),
        *(Contender(f"medusa {name}", sys.executable, ours | {"profile": name}) for name in arguments.profile),
    ]


def make_models(arguments: argparse.Namespace) -> dict[str, str]:
    """Create the peers' models from the same weights, in a new process; return their paths."""
    types = dict.fromkeys(name for precision in arguments.precision for name in LLAMA_TYPES[precision])
    job = {
        "model": arguments.model,
        "cache": str(arguments.cache),
        "python": arguments.peer_python,
        "genai": list(dict.fromkeys(GENAI_TYPES[precision] for precision in arguments.precision)),
        "llama": list(types) if arguments.llama else [],
    }
    make = [sys.executable, str(HERE / "peers_model.py")]
    built = subprocess.run(make, input=json.dumps(job), check=False, stdout=subprocess.PIPE, text=True)
    if built.returncode:
        raise SystemExit("the peers' models could not be created; the messages above have the reason")
    models: dict[str, str] = json.loads(built.stdout.strip().splitlines()[-1])
    return models


def check_outputs(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with an error if an output would overwrite a file that this script did not write."""
    try:
        check_output_file(arguments.json, OUTPUT, inputs=[arguments.prompts], bundle=arguments.bundle)
        if arguments.plot:
            if arguments.plot.suffix not in PLOT_TYPES:
                parser.error(f"--plot {arguments.plot}: expected a name that ends in {' or '.join(PLOT_TYPES)}")
            check_output_file(arguments.plot, PLOT, inputs=[arguments.prompts, arguments.json], bundle=arguments.bundle)
    except OverwriteError as error:
        parser.error(str(error))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; exit with an error for values that do not fit together."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--bundle", type=Path, required=True, help="Bundle folder.")
    parser.add_argument("--model", required=True, help="Model that the bundle was built from: .gguf file or folder.")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="JSON Lines file; each line has a list of texts under 'turns'."
    )
    parser.add_argument("--limit", type=int, default=12, help="Maximum number of prompts (default: %(default)s).")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="Tokens per answer (default: %(default)s).")
    parser.add_argument("--threads", type=int, help="Threads of every system (default: one per physical core).")
    parser.add_argument("--rounds", type=int, default=3, help="Number of rounds (default: %(default)s).")
    parser.add_argument(
        "--attempts",
        type=int,
        default=1,
        help="Largest number of attempts for an answer that other processes disturb (default: %(default)s).",
    )
    parser.add_argument(
        "--precision",
        action="append",
        choices=list(LLAMA_TYPES),
        help="Precision to measure; may be repeated (default: fp32).",
    )
    parser.add_argument("--profile", action="append", default=[], help="Tree to measure as well; may be repeated.")
    parser.add_argument("--no-llama", dest="llama", action="store_false", help="Do not measure llama.cpp.")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/peers"), help="Folder for the peers' models (default: %(default)s)."
    )
    parser.add_argument(
        "--peer-python", default=sys.executable, help="Python interpreter in which the peers are installed."
    )
    parser.add_argument("--json", type=Path, required=True, help="File to write all results to.")
    parser.add_argument("--plot", type=Path, help="File for a plot of tokens per second (.svg or .png).")
    arguments = parser.parse_args()
    arguments.precision = list(dict.fromkeys(arguments.precision or ["fp32"]))
    if min(arguments.rounds, arguments.limit, arguments.attempts, arguments.max_new_tokens - 1) < 1:
        parser.error("--rounds, --limit and --attempts must be at least 1, --max-new-tokens at least 2")
    if arguments.llama and not arguments.model.endswith(".gguf"):
        parser.error("llama.cpp's models can be created from a .gguf file only; give one as --model, or use --no-llama")

    check_outputs(parser, arguments)
    return arguments


def main() -> None:
    """Parse the command line, measure, report."""
    arguments = parse_arguments()

    from medusa_runtime.bundle import Bundle

    bundle = Bundle.open(arguments.bundle)
    for precision in arguments.precision:
        bundle.graph("ort-cpu", precision)  # fails early if the bundle has no such graph
    prompts = read_prompts(arguments.prompts, arguments.limit, bundle)
    facts = machine()
    common = {
        "prompts": prompts,
        "max_new_tokens": arguments.max_new_tokens,
        "warm_up_tokens": min(WARM_UP_TOKENS, arguments.max_new_tokens),
        "threads": arguments.threads or facts["physical_cores"],
        "attempts": arguments.attempts,
    }
    models = make_models(arguments)
    systems = {precision: contenders(arguments, precision, models) for precision in arguments.precision}
    for number in range(arguments.rounds):
        for precision, tested in systems.items():
            for system in tested if number % 2 == 0 else reversed(tested):
                measure(system, common)
                step, rate = step_ms(system.reports[-1]), token_rate(system.reports[-1])
                line = f"round {number + 1}: {precision}: {system.name}: {step:.2f} ms/step, {rate:.1f} tokens/s"
                print(line, file=sys.stderr)
    eos = frozenset(bundle.model.eos_token_ids)
    results = {precision: summarise(tested, eos) for precision, tested in systems.items()}
    settings = {name: value for name, value in common.items() if name != "prompts"}
    settings |= {"prompts": len(prompts), "rounds": arguments.rounds}
    everything = {"machine": facts, "settings": settings, "precisions": results}
    write_json(arguments.json, OUTPUT.marked(everything))
    for precision, result in results.items():
        print_table(precision, result)
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
