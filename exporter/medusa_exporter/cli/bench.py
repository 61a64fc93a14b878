"""`medusa-export bench`: time tree decoding against plain decoding, on several backends in turns."""

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

from medusa_exporter.bench.cases import Job, check_capacity, open_backends, run_case
from medusa_exporter.bench.conversations import PLAIN_TEXT
from medusa_exporter.bench.fixed_length_prompts import prompts_of_length
from medusa_exporter.bench.forced_acceptance import RecordedAcceptance
from medusa_exporter.bench.results import Case, backend_facts, document, results
from medusa_exporter.bench.table import categories, table
from medusa_exporter.bench.worker import Worker
from medusa_exporter.cli.options import (
    Progress,
    choose_trees,
    digest_option,
    gpu_option,
    length_option,
    precision_option,
    split_commas,
    split_numbers,
)
from medusa_exporter.files import write_json
from medusa_exporter.output_kinds import BENCH
from medusa_exporter.overwrite_check import check_output_file
from medusa_exporter.prompts import load_prompts, read_categories
from medusa_exporter.verify import Difference


def split_backends(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Flatten --backends, each once; refuse a name that is none."""
    names = tuple(dict.fromkeys(split_commas(context, parameter, values)))
    for name in names:
        if name not in BACKENDS:
            raise click.BadParameter(f"{name!r} is no backend; expected some of {', '.join(BACKENDS)}")
    return names


@click.command(name="bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", "file", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--profile", "profiles", multiple=True, callback=split_commas, help="Trees to time. Default: all of the bundle."
)
@click.option(
    "--backends",
    "--backend",
    "backends",
    default=("ort-cpu",),
    show_default=True,
    multiple=True,
    callback=split_backends,
    help=f"Of {', '.join(BACKENDS)}; several take turns, each in a process of its own.",
)
@precision_option
@digest_option
@click.option(
    "--threads", type=click.IntRange(min=1), help="Default: one per physical core, within a container's quota."
)
@length_option
@gpu_option
@click.option(
    "--prompt-length",
    "lengths",
    multiple=True,
    callback=split_numbers(1),
    help="Tokens: prompts are made of the file's text, so long each. Default: as they are, later turns too.",
)
@click.option(
    "--max-new-tokens",
    "limits",
    default=("128",),
    show_default=True,
    multiple=True,
    callback=split_numbers(2),
    help="Per answer; with --prompt-length each answer has exactly so many.",
)
@click.option("--turns", default="all", show_default=True, type=click.Choice(["all", "first"]))
@click.option("--limit", type=click.IntRange(min=1), help="At most so many prompts of the file.")
@click.option(
    "--forced",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Accept as many tokens a step as this JSON of another bench did: for heads that were never trained. LOSSY.",
)
@click.option("--json", "output", required=True, type=click.Path(path_type=Path), help="Where the figures go.")
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
    output: Path,
    expected_digest: str | None,
) -> None:
    """Time BUNDLE's trees against its own plain decoding (one token a step, no heads run), prompt by prompt.

    The prompt file holds JSON lines with "turns", a list of user messages; a later message is asked after the model's
    own answers. Plain decoding and every tree, on every backend, answer a message before the next one is asked, warmed
    up and in changing order. There is a result for each backend, profile ("plain" is one), --prompt-length and
    --max-new-tokens. Exit code 1 when a backend fails, or tokens differ from plain decoding's by more than a tie (1e-3
    logits in fp32, where weights are quantised 1% of the row's range); the JSON is written all the same. Lines that
    have a "category" are counted by it too.
    """
    check_output_file(output, BENCH, inputs=[file, *([forced] if forced else [])], bundle=bundle)
    prompts, kinds = load_prompts(file, limit), read_categories(file)
    opened = Bundle.open(bundle, expected_digest=expected_digest)
    for name in backends:
        opened.graph(name, precision)  # fails at once where the bundle has none
    trees = choose_trees(opened, profiles)
    recording = None if forced is None else RecordedAcceptance.read(forced, trees)
    cases = [Case(*sizes) for sizes in product(lengths or (None,), limits)]
    encoder = PromptEncoder(opened)
    if not encoder.has_chat_template:
        click.echo(PLAIN_TEXT, err=True)
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
        _measure(job, workers, precision, threads, content, output)
    finally:
        for worker in workers.values():
            worker.close()
    click.echo(_summary(content, encoder.tokenizer))
    if content["failures"]:
        raise MedusaError(f"{'; '.join(content['failures'].values())}. {output} holds what was measured")
    if failures := sum(result["failures"] for result in content["results"]):
        raise MedusaError(
            f"{failures} answers differ from plain decoding's by more than a tie: the figures in {output} are not of "
            "the same text; look into it with medusa-export verify"
        )


def _measure(
    job: Job,
    workers: Mapping[str, Worker],
    precision: str | None,
    threads: int | None,
    content: dict[str, Any],
    output: Path,
) -> None:
    """Fill in backends and results, written case by case. Raises MedusaError where nothing could be timed."""
    report = Progress().report
    opened = open_backends(job, workers, precision, threads, report)
    running = {name: workers[name] for name in opened}
    context = check_capacity(job, opened)
    content["backends"] = {name: backend_facts(one) for name, one in opened.items()}
    for case in job.cases:
        if len(job.cases) > 1:
            report(case.describe())
        done, skipped = run_case(job, case, running, context, report)
        content["results"] += results(case, done, opened, job.trees, job.categories, ends=job.ends(case))
        content["prompts"]["turns"] += len(done)
        content["prompts"]["skipped"] += [
            {"prompt": one.prompt, "turn": one.turn, "tokens": one.tokens} for one in skipped
        ]
        content["failures"] = {name: worker.failure for name, worker in workers.items() if worker.failure}
        if any(result["steps"] for result in content["results"]):
            write_json(output, BENCH.marked(content))
        if all(worker.failure for worker in running.values()):
            break
    if not any(result["steps"] for result in content["results"]):
        why = "; ".join(content["failures"].values()) or "nothing to time"
        raise MedusaError(f"no step was taken on the {len(job.prompts)} prompts of {content['prompts']['file']}: {why}")


def _summary(content: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Table, categories, and each answer that differs from plain decoding's."""
    found: list[dict[str, Any]] = content["results"]
    several = len({result["backend"] for result in found}) > 1
    lines = [table(found)]
    if content["settings"]["forced"] is not None:
        forced = content["settings"]["forced"]
        lines += [
            f"FORCED: steps kept as many tokens as {forced['model']}'s did in {forced['file']}; this model's heads had "
            "no say, and the answers mean nothing"
        ]
    cases = [*dict.fromkeys(map(_case, found))]
    first = [one for one in found if (one["backend"], _case(one)) == (found[0]["backend"], cases[0])]
    lines += [text for text in [categories(first)] if text]
    for result in found:
        where = f"{result['backend']}, {result['profile']}" if several else result["profile"]
        if len(cases) > 1:
            where += f", {_case(result).describe()}"
        same = result["same_as_first"]
        if same is not None and result["profile"] == PLAIN:
            lines.append(f"{where}: {same['equal']} of {same['answers']} answers are {found[0]['backend']}'s")
        for one in result["differences"]:
            parted = Difference(**{name: value for name, value in one.items() if name not in ("prompt", "turn")})
            lines.append(f"prompt {one['prompt']}, turn {one['turn']}, {where}: {parted.describe(tokenizer)}")
    return "\n".join(lines)


def _case(result: dict[str, Any]) -> Case:
    return Case(result["prompt_length"], result["max_new_tokens"])
