"""`medusa-export generate`: answer one prompt, or a file of requests, with a bundle."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import click
from medusa_profiles.catalogue import profile_from_file
from medusa_profiles.profile import TreeProfile
from medusa_runtime.bundle import Bundle
from medusa_runtime.engine import Engine
from medusa_runtime.prompt_encoder import Prompt
from medusa_runtime.prompt_options import PromptOptions
from medusa_runtime.sampling_params import HEADS, LOSSLESS, SamplingParams

from medusa_exporter.batch.answering import answer_batch
from medusa_exporter.batch.plan import BatchPlan, BatchSummary
from medusa_exporter.batch.responses_file import ResponsesFile
from medusa_exporter.cli.answers import as_json, describe, describe_comparison, print_answers
from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import (
    INPUT_FILE,
    backend_option,
    calibration_option,
    digest_option,
    gpu_option,
    length_option,
    precision_option,
    threads_option,
)
from medusa_exporter.cli.prompt_inputs import prompt_options, read_list, read_text
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.cli.sampling_options import sampling_options, wrong_arguments_are_usage
from medusa_exporter.console import note
from medusa_exporter.library_logging import ends_are_not_logged
from medusa_exporter.output_kinds import SUMMARIES
from medusa_exporter.wording import counted

KIND = SUMMARIES["generate"]
PLAIN = "plain"


@click.command(
    name="generate",
    cls=Command,
    example=(
        'medusa-export generate bundle "Why is the sky blue?" --profile tree-4\n'
        "medusa-export generate bundle --batch-file requests.jsonl -o responses.jsonl"
    ),
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option(
    "--profile",
    metavar="NAME|FILE",
    help="Tree to decode with: a name in the bundle, e.g. tree-4, a .toml file, or plain for one token at a time. "
    "Default: each step verifies what is expected to be the fastest, as --draft auto does.",
)
@calibration_option
@backend_option()
@precision_option
@digest_option
@threads_option
@length_option
@gpu_option
@prompt_options
@sampling_options
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Time after which the answer ends with an error; what was printed stays. Default: no limit.",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Answer with plain decoding and the same seed too, then compare tokens and speed.",
)
@click.option(
    "--batch-file",
    type=INPUT_FILE,
    metavar="FILE",
    help="JSON Lines file of requests in OpenAI's batch format to answer in place of PROMPT. The sampling options are "
    "used where a request has none of its own.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="JSON Lines file to write the responses of --batch-file to.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Answer all requests of --batch-file anew, whatever an earlier run has written.",
)
@json_option("the answers, or a summary of the batch,")
def command(
    bundle: Path,
    prompt: str | None,
    profile: str | None,
    calibration: Path | None,
    backend: str,
    precision: str | None,
    expected_digest: str | None,
    threads: int | None,
    max_length: int | None,
    gpu: int,
    messages: Path | None,
    tools: Path | None,
    chat_template_arguments: dict[str, Any],
    continue_final_message: bool,
    sanitize: bool,
    raw: bool,
    chat_template: str | None,
    params: SamplingParams,
    timeout: float | None,
    compare: bool,
    batch_file: Path | None,
    output: Path | None,
    force: bool,
    results: Results,
) -> None:
    r"""Answer PROMPT with BUNDLE and print the answer while it is generated.

    PROMPT is the text of one user message; - reads it from standard input. The number of tokens and steps and the speed
    go to standard error. With --n, each answer is printed whole, below a line with its number.

    With --batch-file, all requests of a file are answered into another file. The same command resumes a run that was
    interrupted, and does nothing if the output is complete.
    """
    of_templates = {
        "--tools": tools is not None,
        "--continue-final-message": continue_final_message,
        "--messages": messages is not None,
        "--chat-template-argument": bool(chat_template_arguments),
    }
    if raw and any(of_templates.values()):
        name = next(name for name, is_used in of_templates.items() if is_used)
        raise click.UsageError(f"{name} does not go with --raw, which uses no chat template; leave out one of the two")
    _check_usage(
        {"PROMPT": prompt is not None, "--messages": messages is not None, "--batch-file": batch_file is not None},
        of_prompts={
            "--tools": tools is not None,
            "--continue-final-message": continue_final_message,
            "--raw": raw,
            "--timeout": timeout is not None,
            "--compare": compare,
        },
        of_batches={"--output": output is not None, "--force": force},
    )
    if profile is not None and params.draft not in (None, HEADS):
        raise click.UsageError(
            f"--draft {params.draft} does not go with --profile, the same tree in every step; leave out one of the two"
        )
    tree = profile and (profile_from_file(profile) or profile)
    load = partial(
        Engine.load,
        bundle,
        backend=backend,
        profile=tree,
        precision=precision,
        threads=threads,
        max_length=max_length,
        gpu=gpu,
        chat_template=chat_template,
        calibration=calibration,
    )
    if batch_file is not None and output is not None:
        if "-" in (str(batch_file), str(output)):
            raise click.UsageError("a batch is read from a file and written to a file; expected their names, got -")
        outputs = ResponsesFile.at(output)
        outputs.check(inputs=[batch_file], bundle=bundle)
        results.check(KIND, inputs=[batch_file], outputs=[outputs.path, outputs.part], bundle=bundle)
        opened = Bundle.open(bundle, expected_digest=expected_digest)
        settings = {
            "backend": backend,
            "precision": opened.graph(backend, precision)[0].precision,
            "max_length": max_length,
            "chat_template": chat_template,
            "profile": None if params.acceptance == LOSSLESS else _describe_tree(tree),
        }
        plan = BatchPlan(batch_file, output, params, chat_template_arguments, sanitize, settings)
        load = partial(load, expected_digest=opened.manifest.digest)
        _write_summary(answer_batch(plan, opened, load, force=force), output, results)
        return
    results.check(KIND, inputs=[file for file in (messages, tools) if file is not None], bundle=bundle)
    options: PromptOptions = {"raw": raw, "sanitize": sanitize, "continue_final_message": continue_final_message}
    if tools is not None:
        options["tools"] = read_list(tools, "tools")
    if chat_template_arguments:
        options["chat_template_arguments"] = chat_template_arguments
    asked: Prompt = read_list(messages, "messages") if messages is not None else read_text(prompt or "")
    with (
        load(expected_digest=expected_digest, prefix_cache_bytes=0) as engine,
        wrong_arguments_are_usage(),
        ends_are_not_logged(),
    ):
        _answer(engine, asked, params, options, timeout, compare, results)


def _check_usage(prompts: dict[str, bool], of_prompts: dict[str, bool], of_batches: dict[str, bool]) -> None:
    """Refuse options that exclude each other, by which of them were used."""
    used = [name for name, is_used in prompts.items() if is_used]
    if len(used) != 1:
        got = f"got {' and '.join(used)}" if used else "no prompt"
        raise click.UsageError(f"{got}, expected one of PROMPT, --messages FILE and --batch-file FILE")
    is_batch = used == ["--batch-file"]
    unfit = of_prompts if is_batch else of_batches
    if wrong := next((name for name, is_used in unfit.items() if is_used), None):
        other = "does not go with --batch-file" if is_batch else "needs --batch-file FILE"
        raise click.UsageError(f"{wrong} {other}; leave it out")
    if is_batch and not of_batches["--output"]:
        raise click.UsageError("--batch-file needs -o FILE, the file to write the responses to")


def _answer(
    engine: Engine,
    prompt: Prompt,
    params: SamplingParams,
    options: PromptOptions,
    timeout: float | None,
    compare: bool,
    results: Results,
) -> None:
    """Print the answers to a prompt and write the results."""
    with engine.submit(prompt, params, timeout=timeout, **options) as handle:
        result = print_answers(handle, params.n, results)
    lossy = params.acceptance != LOSSLESS
    remark = f" (acceptance {result.acceptance}: lossy, not the answer of plain decoding)" if lossy else ""
    drawn = "" if params.is_greedy or params.seed is not None else f"; drawn with --seed {result.seed}"
    note(describe(result) + drawn + remark)
    if params.logprobs is not None and not results.wants_json:
        note("log-probabilities are only written with --json FILE (- is standard output)")
    content = as_json(result)
    if compare:
        same = dataclasses.replace(params, profile=PLAIN, draft=HEADS, seed=result.seed)
        plain = engine.generate(prompt, same, timeout=timeout, **options)
        note(describe(plain))
        note(describe_comparison(plain, result))
        content["plain"] = as_json(plain)
        content["same_tokens"] = [one.token_ids for one in plain.choices] == [one.token_ids for one in result.choices]
    results.write(KIND, content)


def _describe_tree(tree: str | TreeProfile | None) -> Any:
    return dataclasses.asdict(tree) if isinstance(tree, TreeProfile) else tree


def _write_summary(summary: BatchSummary, output: Path, results: Results) -> None:
    """Report what a batch has done."""
    answered = summary.statuses[200]
    refused = sum(count for status, count in summary.statuses.items() if 400 <= status < 500)
    failed = summary.requests - answered - refused
    if summary.completion_tokens and summary.seconds:
        speed = summary.completion_tokens / summary.seconds
        steps = f", {summary.tokens_per_step:.2f} tokens/step" if summary.tokens_per_step else ""
        tokens = counted(summary.completion_tokens, "token")
        note(f"{tokens} in {summary.seconds:.1f} s, {speed:.1f} tokens/s{steps}")
    results.echo(f"{answered} answered, {refused} refused (status 400), {failed} failed (status 500) -> {output}")
    content = {
        "output": str(output),
        "requests": summary.requests,
        "answered": answered,
        "refused": refused,
        "failed": failed,
        "resumed": summary.resumed,
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
        "tokens_per_step": summary.tokens_per_step,
        "seconds": summary.seconds,
    }
    results.write(KIND, content)
