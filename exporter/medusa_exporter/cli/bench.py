"""`medusa-export bench`: measure the speed of tree decoding compared with plain decoding."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import click
from medusa_runtime.backends import BACKENDS
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import MedusaError
from medusa_runtime.facts import PLAIN
from medusa_runtime.prompt_encoder import PromptEncoder
from medusa_runtime.tokenizer import Tokenizer

from medusa_exporter.answer_differences import AnswerDifference
from medusa_exporter.bench.cases import Job, check_capacity, open_backends, run_case
from medusa_exporter.bench.conversations import PLAIN_TEXT
from medusa_exporter.bench.fixed_length_prompts import prompts_of_length
from medusa_exporter.bench.forced_acceptance import RecordedAcceptance
from medusa_exporter.bench.results import Case, backend_facts, case_results, document
from medusa_exporter.bench.table import categories_table, results_table
from medusa_exporter.bench.worker import Worker
from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import (
    INPUT_FILE,
    backends_option,
    choose_trees,
    digest_option,
    gpu_option,
    length_option,
    limit_option,
    list_option,
    precision_option,
    profiles_option,
    threads_option,
    turns_option,
)
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import Progress, note
from medusa_exporter.output_kinds import BENCH
from medusa_exporter.prompts import load_prompts, read_categories


@click.command(
    name="bench",
    cls=Command,
    example="medusa-export bench bundle --prompts prompts.jsonl --json bench.json",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    "file",
    required=True,
    type=INPUT_FILE,
    metavar="FILE",
    help='JSON Lines file of prompts: each line has "turns", a list of user messages, and may have a "category".',
)
@profiles_option("measure")
@backends_option(
    f"Backends to measure: {', '.join(BACKENDS)}. Each runs in its own process; they answer each prompt in alternation."
)
@precision_option
@digest_option
@threads_option
@length_option
@gpu_option
@list_option(
    "--prompt-length",
    "lengths",
    metavar="TOKENS",
    kind=click.IntRange(min=1),
    help="Measure with prompts of exactly so many tokens, cut from the text of the file. Default: the prompts as they "
    "are, with all turns.",
)
@list_option(
    "--max-new-tokens",
    "limits",
    metavar="TOKENS",
    kind=click.IntRange(min=2),
    default=("128",),
    show_default=True,
    help="Maximum number of tokens of an answer; with --prompt-length the exact number.",
)
@turns_option
@limit_option
@click.option(
    "--forced",
    type=INPUT_FILE,
    metavar="FILE",
    help="Accept as many tokens in each step as the run in this JSON file of bench did, whatever the heads predict. "
    "For heads that are not trained; the answers are lossy and have no meaning.",
)
@json_option("the results")
def command(
    bundle: Path,
    file: Path,
    profiles: tuple[str, ...],
    backends: tuple[str, ...],
    precision: str | None,
    threads: int | None,
    max_length: int | None,
    gpu: int,
    lengths: tuple[int, ...],
    limits: tuple[int, ...],
    turns: str,
    limit: int | None,
    forced: Path | None,
    expected_digest: str | None,
    results: Results,
) -> None:
    """Measure how fast the trees of BUNDLE decode, compared with plain decoding of the same bundle.

    Plain decoding runs one token in each step and no heads. It and every tree, on every backend, answer each user
    message in alternation, so that all see the same state of the machine; a later message of a prompt is asked after
    the model's own answers. Results are reported for each backend, tree, --prompt-length and --max-new-tokens, and for
    each category if lines of the prompt file have a "category". The JSON file is what `medusa-export report` reads.

    Exit code 1 if a backend fails, or if a tree gives other tokens than plain decoding and the difference is more than
    a tie (see `medusa-export verify`). The JSON is written in both cases.
    """
    results.check(BENCH, inputs=[file, *([forced] if forced else [])], bundle=bundle)
    prompts, kinds = load_prompts(file, limit), read_categories(file)
    opened = Bundle.open(bundle, expected_digest=expected_digest)
    for name in backends:
        opened.graph(name, precision)  # fails at once where the bundle has none
    trees = choose_trees(opened, profiles)
    recording = None if forced is None else RecordedAcceptance.read(forced, trees)
    cases = [Case(*sizes) for sizes in product(lengths or (None,), limits)]
    encoder = PromptEncoder(opened)
    if not encoder.has_chat_template:
        note(PLAIN_TEXT)
    texts = {length: prompts_of_length(encoder, prompts, length) for length in lengths}
    job = Job(opened, encoder, prompts, kinds, texts, trees, cases, turns == "first", recording, max_length, gpu)
    settings = {
        "profiles": [tree.name for tree in trees],
        "accept": "greedy" if recording is None else "forced",
        "forced": None if recording is None else {"file": recording.source, "model": recording.model},
        "prompt_lengths": list(lengths),
        "max_new_tokens": list(limits),
        "turns": turns,
        "limit": limit,
    }
    content = document(opened, file, len(prompts), threads, settings)
    workers = {name: Worker(name) for name in backends}
    try:
        _measure(job, workers, precision, threads, content, results)
    finally:
        for worker in workers.values():
            worker.close()
    results.write(BENCH, content)
    results.echo(_summary(content, encoder.tokenizer))
    if content["failures"]:
        kept = f". {results.file} has the results up to then" if results.file else ""
        raise MedusaError(f"{'; '.join(content['failures'].values())}{kept}")
    if failures := sum(result["mismatches"] for result in content["results"]):
        raise MedusaError(
            f"{failures} answers differ from those of plain decoding by more than a tie, so the results do not compare "
            "the same text; run `medusa-export verify` to see where they differ"
        )


def _measure(
    job: Job,
    workers: Mapping[str, Worker],
    precision: str | None,
    threads: int | None,
    content: dict[str, Any],
    results: Results,
) -> None:
    """Fill in backends and results, and save them after each case. Raises MedusaError if nothing could be measured."""
    report = Progress().report
    opened = open_backends(job, workers, precision, threads, report)
    running = {name: workers[name] for name in opened}
    context = check_capacity(job, opened)
    content["backends"] = {name: backend_facts(one) for name, one in opened.items()}
    for case in job.cases:
        if len(job.cases) > 1:
            report(case.describe())
        done, skipped = run_case(job, case, running, context, report)
        content["results"] += case_results(
            case, done, opened, job.trees, job.categories, stop_at_eos=job.stop_at_eos(case)
        )
        content["prompts"]["turns"] += len(done)
        content["prompts"]["skipped"] += [
            {"prompt": one.prompt, "turn": one.turn, "tokens": one.tokens} for one in skipped
        ]
        content["failures"] = {name: worker.failure for name, worker in workers.items() if worker.failure}
        if any(result["steps"] for result in content["results"]):
            results.save(BENCH, content)
        if all(worker.failure for worker in running.values()):
            break
    if not any(result["steps"] for result in content["results"]):
        why = "; ".join(content["failures"].values()) or "nothing to time"
        raise MedusaError(f"no step was taken on the {len(job.prompts)} prompts of {content['prompts']['file']}: {why}")


def _summary(content: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Format the table, the categories, and each answer that differs from that of plain decoding."""
    found: list[dict[str, Any]] = content["results"]
    several = len({result["backend"] for result in found}) > 1
    lines = [results_table(found)]
    if content["settings"]["forced"] is not None:
        forced = content["settings"]["forced"]
        lines += [
            f"FORCED: steps kept as many tokens as {forced['model']}'s did in {forced['file']}; this model's heads "
            "were ignored, and the answers have no meaning"
        ]
    cases = [*dict.fromkeys(map(_case, found))]
    first = [one for one in found if (one["backend"], _case(one)) == (found[0]["backend"], cases[0])]
    lines += [text for text in [categories_table(first)] if text]
    for result in found:
        where = f"{result['backend']}, {result['profile']}" if several else result["profile"]
        if len(cases) > 1:
            where += f", {_case(result).describe()}"
        same = result["same_as_first_backend"]
        if same is not None and result["profile"] == PLAIN:
            lines.append(f"{where}: {same['identical']} of {same['answers']} answers are {found[0]['backend']}'s")
        for one in result["differences"]:
            parted = AnswerDifference(**{name: value for name, value in one.items() if name not in ("prompt", "turn")})
            lines.append(f"prompt {one['prompt']}, turn {one['turn']}, {where}: {parted.describe(tokenizer)}")
    return "\n".join(lines)


def _case(result: dict[str, Any]) -> Case:
    return Case(result["prompt_length"], result["max_new_tokens"])
