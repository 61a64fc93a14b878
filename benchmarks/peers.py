"""Compares our decode step with what users would pick instead, on the same weights, prompts, tokens and threads.

Systems are measured in processes of their own, in turns: ours, the peer's, ours, … for several rounds, since a
machine's speed drifts and two inference sessions in one process disturb each other. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PLAIN, GENAI = "medusa plain", "genai"
WARM_UP_TOKENS = 24

Report = dict[str, Any]  # what a worker printed (peers_worker.py)


@dataclass
class Contender:
    """A system under test: what its worker is told besides the prompts, and what came back, round by round."""

    name: str
    python: str
    job: dict[str, Any]
    reports: list[Report] = field(default_factory=list)

    def run(self, common: dict[str, Any]) -> None:
        """Measure once, in a new process."""
        done = subprocess.run(
            [self.python, str(HERE / "peers_worker.py")],
            input=json.dumps(common | self.job),
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"the worker of {self.name} failed:\n{done.stderr[-3000:]}")
        self.reports.append(json.loads(done.stdout))

    def per_round(self, figure: Callable[[Report], float]) -> list[float]:
        """One figure of each round."""
        return [figure(report) for report in self.reports]


def _total(report: Report, name: str) -> float:
    return sum(float(prompt[name]) for prompt in report["prompts"])


def _middle_ms(report: Report, name: str) -> float:
    return 1e3 * statistics.median(float(prompt[name]) for prompt in report["prompts"])


def step_ms(report: Report) -> float:
    """Milliseconds per step: the median over prompts of the mean over an answer."""
    means = [float(prompt["decode_seconds"]) / int(prompt["steps"]) for prompt in report["prompts"]]
    return 1e3 * statistics.median(means)


def typical_step_ms(report: Report) -> float:
    """Milliseconds of the middle step: the median over prompts of the median over an answer."""
    return _middle_ms(report, "median_step_seconds")


def token_rate(report: Report) -> float:
    """Decoded tokens per second, all prompts together."""
    return _total(report, "tokens") / _total(report, "decode_seconds")


def prefill_ms(report: Report) -> float:
    """Milliseconds until the first token: the median over prompts."""
    return _middle_ms(report, "prefill_seconds")


def tokens_per_step(report: Report) -> float:
    """How many tokens a step adds, all prompts together; 1 where nothing is speculated."""
    return _total(report, "tokens") / _total(report, "steps")


def other_load(report: Report) -> float:
    """Share of the machine's processors that other processes took, the mean over prompts."""
    return _total(report, "other_load") / len(report["prompts"])


FIGURES: dict[str, Callable[[Report], float]] = {
    "step_ms": step_ms,
    "typical_step_ms": typical_step_ms,
    "tokens_per_second": token_rate,
    "tokens_per_step": tokens_per_step,
    "prefill_ms": prefill_ms,
    "other_load": other_load,
    "load_seconds": lambda report: float(report["load_seconds"]),
    "peak_memory_mb": lambda report: float(report["peak_memory_bytes"]) / 1e6,
}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Summarise one figure over the rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def ratio(ours: Contender, peer: Contender, figure: Callable[[Report], float]) -> dict[str, Any]:
    """Summarise ours / peer's, taken round by round: the two halves of a round ran next to each other."""
    pairs = zip(ours.per_round(figure), peer.per_round(figure), strict=True)
    return spread([mine / theirs for mine, theirs in pairs])


def agreement(ours: Report, other: Report, eos: frozenset[int]) -> dict[str, Any]:
    """Count how many leading tokens of each answer are equal.

    Counted up to the first end token of ours: there a peer that is told to go on takes its second choice.
    """
    equal, length = [], []
    for mine, theirs in zip(ours["prompts"], other["prompts"], strict=True):
        tokens = mine["answer"]
        end = next((at for at, token in enumerate(tokens) if token in eos), len(tokens))
        pairs = zip(tokens[:end], theirs["answer"][:end], strict=True)
        equal.append(next((at for at, (a, b) in enumerate(pairs) if a != b), end))
        length.append(end)
    return {
        "answers": len(equal),
        "answers_equal": sum(e == n for e, n in zip(equal, length, strict=True)),
        "tokens": sum(length),
        "leading_tokens_equal": sum(equal),
        "first_difference": [None if e == n else e for e, n in zip(equal, length, strict=True)],
    }


def read_prompts(file: Path, limit: int, bundle: Any) -> list[list[int]]:
    """Token ids of the first turns, laid out by the bundle's chat template (bare text if it has none)."""
    from medusa_runtime.chat import ChatTemplate
    from medusa_runtime.text import Tokenizer

    tokenizer = Tokenizer(bundle.tokenizer_file)
    template = ChatTemplate(bundle.chat_template, bundle.special_tokens) if bundle.chat_template else None
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    turns = [json.loads(line)["turns"][0] for line in lines[:limit]]
    if not turns:
        raise SystemExit(f"{file} has no prompts: expected JSON lines with a list of texts under 'turns'")
    if template is not None:
        turns = [template.render([{"role": "user", "content": turn}]) for turn in turns]
    return [tokenizer.encode(turn, add_special_tokens=template is None) for turn in turns]


def machine() -> dict[str, Any]:
    """Say what the figures were measured on."""
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


def contenders(arguments: argparse.Namespace, genai_model: str) -> list[Contender]:
    """Everything that this run measures; the first is ours, plain."""
    ours = {"system": "medusa", "bundle": str(arguments.bundle), "backend": "ort-cpu", "precision": "fp32"}
    return [
        Contender(PLAIN, sys.executable, ours | {"profile": None}),
        Contender(GENAI, arguments.genai_python, {"system": "genai", "model": genai_model}),
        *(Contender(f"medusa {name}", sys.executable, ours | {"profile": name}) for name in arguments.profile),
    ]


def _without_answer(prompt: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in prompt.items() if name != "answer"}


def summarise(systems: list[Contender], eos: frozenset[int]) -> dict[str, Any]:
    """Everything that came out, without the answers."""
    plain, genai = systems[0], systems[1]
    last = {system.name: system.reports[-1] for system in systems}
    return {
        "systems": {
            system.name: {
                **{name: spread(system.per_round(figure)) for name, figure in FIGURES.items()},
                "versions": last[system.name]["versions"],
                "agreement_with_plain": agreement(last[PLAIN], last[system.name], eos),
                "prompts": [[_without_answer(prompt) for prompt in report["prompts"]] for report in system.reports],
            }
            for system in systems
        },
        "plain_step_over_genai": ratio(plain, genai, step_ms),
        "plain_typical_step_over_genai": ratio(plain, genai, typical_step_ms),
        "token_rate_over_genai": {system.name: ratio(system, genai, token_rate) for system in systems},
        "token_rate_over_plain": {system.name: ratio(system, plain, token_rate) for system in systems},
    }


def print_table(result: dict[str, Any]) -> None:
    """Medians over the rounds, the smallest and largest in brackets."""

    def cell(figure: dict[str, Any], digits: int) -> str:
        return f"{figure['median']:.{digits}f} ({figure['min']:.{digits}f}–{figure['max']:.{digits}f})"

    columns = (
        "",
        "ms/step",
        "typical step",
        "tokens/s",
        "tokens/step",
        "× genai",
        "prefill ms",
        "others",
        "tokens as plain",
    )
    rows = [columns]
    for name, system in result["systems"].items():
        same = system["agreement_with_plain"]
        rows.append(
            (
                name,
                cell(system["step_ms"], 2),
                f"{system['typical_step_ms']['median']:.2f}",
                cell(system["tokens_per_second"], 1),
                f"{system['tokens_per_step']['median']:.3f}",
                cell(result["token_rate_over_genai"][name], 2),
                f"{system['prefill_ms']['median']:.0f}",
                f"{system['other_load']['median']:.0%}",
                f"{same['leading_tokens_equal']}/{same['tokens']} "
                f"({same['answers_equal']}/{same['answers']} answers whole)",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nplain step, ours / genai: {cell(result['plain_step_over_genai'], 3)} over whole answers, ", end="")
    print(f"{cell(result['plain_typical_step_over_genai'], 3)} by the typical step")


def main() -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle made by medusa-export build")
    parser.add_argument("--model", required=True, help="the model that the bundle was made from: .gguf file or folder")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines, each with texts under 'turns'")
    parser.add_argument("--limit", type=int, default=12, help="how many prompts (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens per answer (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads for all (default: one per physical core)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each system runs (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=1, help="decode an answer that others disturbed again (1)")
    parser.add_argument("--profile", action="append", default=[], help="also measure this tree; may be repeated")
    parser.add_argument("--cache", type=Path, default=Path(".cache/peers"), help="where models are kept (%(default)s)")
    parser.add_argument("--genai-python", default=sys.executable, help="the interpreter that has onnxruntime-genai")
    parser.add_argument("--json", type=Path, required=True, help="write everything measured here")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.limit, arguments.attempts, arguments.max_new_tokens - 1) < 1:
        parser.error("--rounds, --limit and --attempts must be at least 1, --max-new-tokens at least 2")

    from medusa_runtime.bundle import Bundle

    bundle = Bundle.open(arguments.bundle)
    prompts = read_prompts(arguments.prompts, arguments.limit, bundle)
    facts = machine()
    common = {
        "prompts": prompts,
        "max_new_tokens": arguments.max_new_tokens,
        "warm_up_tokens": min(WARM_UP_TOKENS, arguments.max_new_tokens),
        "threads": arguments.threads or facts["physical_cores"],
        "attempts": arguments.attempts,
    }
    make = [sys.executable, str(HERE / "peers_model.py"), arguments.model, str(arguments.cache), arguments.genai_python]
    built = subprocess.run(make, check=False, stdout=subprocess.PIPE, text=True)
    if built.returncode:
        raise SystemExit("the peer's model could not be made")
    systems = contenders(arguments, built.stdout.strip().splitlines()[-1])
    for number in range(arguments.rounds):
        for system in systems if number % 2 == 0 else reversed(systems):
            system.run(common)
            step, others = (figure(system.reports[-1]) for figure in (step_ms, other_load))
            print(f"round {number + 1}: {system.name}: {step:.2f} ms/step, others took {others:.0%}", file=sys.stderr)
    result = {
        "machine": facts,
        "settings": {name: value for name, value in common.items() if name != "prompts"}
        | {"prompts": len(prompts), "rounds": arguments.rounds, "precision": "fp32"},
        **summarise(systems, frozenset(bundle.model.eos_token_ids)),
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_table(result)


if __name__ == "__main__":
    main()
