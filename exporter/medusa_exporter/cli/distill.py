"""`medusa-export distill`: let the model write the conversations that heads are trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import (
    INPUT_FILE,
    chat_template_option,
    device_option,
    dtype_option,
    limit_option,
    list_option,
    revision_option,
)
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import note
from medusa_exporter.output_kinds import DATA, REVIEW, SUMMARIES
from medusa_exporter.overwrite_check import check_output_file, check_output_folder
from medusa_exporter.wording import counted

KIND = SUMMARIES["distill"]

DEFAULT_CONTEXT = 768


@click.command(
    name="distill",
    cls=Command,
    example=(
        "medusa-export distill HuggingFaceTB/SmolLM2-135M-Instruct \\\n"
        "  --prompts prompts.jsonl --temperature 0,0.7 -o data"
    ),
)
@click.argument("model")
@revision_option
@click.option(
    "--prompts",
    "files",
    multiple=True,
    type=INPUT_FILE,
    metavar="FILE",
    help='JSON Lines file of prompts to answer: each line has "turns", a list of user messages. May be repeated.',
)
@click.option(
    "--exclude",
    multiple=True,
    type=INPUT_FILE,
    metavar="FILE",
    help="JSON Lines file of prompts that must not be in the data, for example those of a benchmark. May be repeated.",
)
@click.option(
    "--answers",
    multiple=True,
    type=INPUT_FILE,
    metavar="FILE",
    help='JSON Lines file of finished conversations to add as they are: each line has "messages", a list of objects '
    'with "role" and "content". May be repeated.',
)
@click.option(
    "--synthesize",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    metavar="N",
    help="Generate N more conversations in which the model writes the first user message too.",
)
@click.option(
    "--follow-ups/--no-follow-ups",
    default=True,
    show_default=True,
    help="Let the model write more user messages and answer them until --context is full, or stop after the prompt's "
    "own turns.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DATA",
    help="Folder to write the conversations to.",
)
@click.option(
    "--max-new-tokens",
    default=320,
    show_default=True,
    type=click.IntRange(2),
    metavar="TOKENS",
    help="Maximum number of tokens of an answer.",
)
@click.option(
    "--context",
    type=click.IntRange(8),
    metavar="TOKENS",
    help=f"Maximum number of tokens of a conversation. Default: {DEFAULT_CONTEXT}, or the context of the model if that "
    "is shorter.",
)
@list_option(
    "--temperature",
    metavar="T",
    kind=click.FloatRange(0, 10),
    default=("0.0",),
    show_default=True,
    help="Sampling temperatures; each prompt is answered once with each of them. 0 is greedy decoding.",
)
@click.option(
    "--top-k",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    metavar="K",
    help="Sample from the K most likely tokens only; 0 samples from all. For temperatures above 0.",
)
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    metavar="P",
    help="Sample from the smallest set of tokens whose probabilities add up to P. For temperatures above 0.",
)
@click.option(
    "--min-p",
    default=0.05,
    show_default=True,
    type=click.FloatRange(0, 1),
    metavar="P",
    help="Sample from tokens that are at least P times as likely as the most likely one. For temperatures above 0.",
)
@chat_template_option
@click.option(
    "--batch",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of conversations that are generated at the same time.",
)
@limit_option
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    metavar="MINUTES",
    help="Time limit: start no batch that would end later. Default: no limit.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), metavar="N", help="Seed of the random numbers."
)
@device_option
@dtype_option
@click.option(
    "--review-out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help='Write the finished conversations to a new JSON Lines file, with "messages" and "id", for people to correct.',
)
@click.option(
    "--review-in",
    type=INPUT_FILE,
    metavar="FILE",
    help="Read the corrected file of --review-out back into DATA, which must be complete. Changed conversations "
    "replace the old ones; missing ones are removed.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Start anew, whatever an earlier run left in DATA. Finished data and corrections "
    "stay until the new data replaces them.",
)
@json_option("a summary of the data")
def command(
    model: str,
    revision: str | None,
    files: tuple[Path, ...],
    exclude: tuple[Path, ...],
    answers: tuple[Path, ...],
    synthesize: int,
    follow_ups: bool,
    output: Path,
    max_new_tokens: int,
    context: int | None,
    temperature: tuple[float, ...],
    top_k: int,
    top_p: float,
    min_p: float,
    chat_template: str | None,
    batch: int,
    limit: int | None,
    minutes: float | None,
    seed: int,
    device: str,
    dtype: str,
    review_out: Path | None,
    review_in: Path | None,
    force: bool,
    results: Results,
) -> None:
    """Let MODEL answer prompts, and write the conversations to DATA: the data that heads are trained on.

    MODEL is a hub name, a folder or a GGUF file. After a prompt's own turns the model writes further user
    messages and answers them.

    The same command resumes a run that was interrupted, and does nothing if DATA is finished. If an argument differs,
    it refuses to touch what is there; --force starts anew.

    To correct the conversations by hand, run the same command with --review-out, edit the file, then run it with
    --review-in.
    """
    if not files and not synthesize and not answers:
        raise click.UsageError("nothing to answer: give --prompts FILE, --synthesize N or --answers FILE")
    if context is not None:
        _check_room(max_new_tokens, context)
    if force and review_in:
        raise click.UsageError("--force starts anew, but --review-in corrects finished data; leave out one of the two")
    given = [*files, *exclude, *answers, *([review_in] if review_in else [])]
    check_output_folder(output, DATA, inputs=[Path(model)] if Path(model).exists() else [])
    data = [output / name for name in DATA]
    if review_out:
        check_output_file(review_out, REVIEW, inputs=given, outputs=data)
    results.check(KIND, inputs=given, outputs=[*data, *([review_out] if review_out else [])])

    from medusa_exporter.distillation.checkpoint import replaces_data
    from medusa_exporter.distillation.conversations import read_conversations
    from medusa_exporter.distillation.dataset import META_NAME, DataError, save_data
    from medusa_exporter.distillation.distill import DistillationPlan, check_context, distill, longest_conversation
    from medusa_exporter.distillation.review import read_review, write_review
    from medusa_exporter.distillation.sampling import Sampling
    from medusa_exporter.loading.templates import choose_template, describe_wanted
    from medusa_exporter.models import ModelSource, check_family, load_model, load_tokenizer, read_config
    from medusa_exporter.prompts import read_prompts
    from medusa_exporter.training.hidden_states import pick_device, pick_dtype

    plan = DistillationPlan(
        conversations=tuple([turns for file in files for turns in read_prompts(file)][:limit]),
        excluded=tuple(turns for file in exclude for turns in read_prompts(file)),
        answers=tuple(found for file in answers for found in read_conversations(file)),
        synthesize=synthesize,
        follow_ups=follow_ups,
        temperatures=temperature,
        sampling=Sampling(top_k, top_p, min_p),
        max_new_tokens=max_new_tokens,
        context=context or DEFAULT_CONTEXT,
        batch=batch,
        seed=seed,
        chat_template=describe_wanted(chat_template),
        revision=revision,
    )
    if review_in and (not (output / META_NAME).is_file() or replaces_data(output)):
        raise DataError(f"{output}: no finished data set; expected one: run the same command without --review-in first")
    source = ModelSource.resolve(model, revision)
    device = pick_device(device)
    check_family(source)
    config = read_config(source)
    if context is None:
        plan = replace(plan, context=min(DEFAULT_CONTEXT, longest_conversation(config)))
        _check_room(max_new_tokens, plan.context)
    check_context(config, plan.context)
    tokenizer = load_tokenizer(source)
    choose_template(tokenizer, chat_template)
    loaded = load_model(source, pick_dtype(dtype, device), device)
    found = distill(loaded, tokenizer, source.name, plan, output, minutes=minutes, report=note, force=force)
    if review_in:
        found, counts = read_review(found, tokenizer, review_in, plan.context)
        save_data(found, output)
        note(f"{', '.join(f'{count} {kind}' for kind, count in counts.items())} -> {output}")
    if review_out:
        written, foreign = write_review(found, tokenizer, review_out)
        left_out = f"; {foreign} that the chat template did not write are left out, and stay in DATA" if foreign else ""
        note(f"{counted(written, 'conversation')}{left_out} -> {review_out}")
    results.write(KIND, {"output": str(output), "rows": found.rows, "tokens": len(found.tokens), "model": source.name})


def _check_room(max_new_tokens: int, context: int) -> None:
    if max_new_tokens >= context:
        raise click.UsageError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in a --context of {context} tokens; "
            "lower --max-new-tokens"
        )
