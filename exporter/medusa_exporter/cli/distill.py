"""`medusa-export distill`: let the model write the conversations that heads are trained on."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_exporter.cli.options import chat_template_option
from medusa_exporter.output_kinds import DATA, REVIEW
from medusa_exporter.overwrite_check import check_output_file, check_output_folder

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(name="distill")
@click.argument("model")
@click.option("--prompts", "files", multiple=True, type=FILE, metavar="FILE", help='JSON lines with "turns".')
@click.option("--exclude", multiple=True, type=FILE, metavar="FILE", help="Prompts that must not be in the data.")
@click.option("--answers", multiple=True, type=FILE, metavar="FILE", help='Ready conversations: lines with "messages".')
@click.option("--synthesize", default=0, type=click.IntRange(0), help="Conversations that the model opens itself.")
@click.option("--follow-ups/--no-follow-ups", default=True, show_default=True, help="Go on until the context is full.")
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DATA")
@click.option("--max-new-tokens", default=320, show_default=True, type=click.IntRange(2), help="Per answer.")
@click.option("--context", default=768, show_default=True, type=click.IntRange(8), help="Tokens of a conversation.")
@click.option("--temperature", multiple=True, default=(0.0,), type=click.FloatRange(0, 10), help="0 is greedy.")
@click.option("--top-k", default=0, type=click.IntRange(0), help="Draw from the k likeliest tokens; 0: from all.")
@click.option("--top-p", default=1.0, type=click.FloatRange(0, 1, min_open=True), help="Draw from this share.")
@click.option("--min-p", default=0.05, show_default=True, type=click.FloatRange(0, 1), help="Share of the likeliest.")
@chat_template_option
@click.option("--batch", default=256, show_default=True, type=click.IntRange(1), help="Conversations at once.")
@click.option("--limit", type=click.IntRange(1), help="At most so many prompts of the files.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Begin nothing that would take longer.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 …")
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(["auto", "float32", "bfloat16"]))
@click.option(
    "--review-out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="New file, to be corrected."
)
@click.option("--review-in", type=FILE, metavar="FILE", help="Corrected; DATA must be complete.")
def command(
    model: str,
    files: tuple[Path, ...],
    exclude: tuple[Path, ...],
    answers: tuple[Path, ...],
    synthesize: int,
    follow_ups: bool,
    output: Path,
    max_new_tokens: int,
    context: int,
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
) -> None:
    """Let MODEL answer prompts, and go on with user turns of its own: the data that heads are trained on.

    --prompts takes JSON lines with "turns", a list of user messages; --answers takes lines with "messages", objects
    with "role" and "content", as they are. --temperature may be given several times: one conversation a prompt each;
    --top-k, --top-p and --min-p bear on those above 0. A run broken off goes on when the same command is given again.

    --review-out writes the finished conversations as lines with "messages" and "id"; --review-in, with the same other
    arguments, takes them back: changed ones are laid out anew, missing ones dropped.
    """
    if not files and not synthesize and not answers:
        raise click.UsageError("nothing to answer: give --prompts FILE, --synthesize N or --answers FILE")
    if max_new_tokens >= context:
        raise click.UsageError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in --context {context}")

    given = [*files, *exclude, *answers, *([review_in] if review_in else [])]
    check_output_folder(output, DATA, inputs=[Path(model)] if Path(model).exists() else [])
    if review_out:
        check_output_file(review_out, REVIEW, inputs=given)

    from medusa_exporter.distillation.conversations import read_conversations
    from medusa_exporter.distillation.dataset import META_NAME, DataError, save_data
    from medusa_exporter.distillation.distill import Plan, distill
    from medusa_exporter.distillation.review import read_review, write_review
    from medusa_exporter.distillation.sampling import Sampling
    from medusa_exporter.loading.templates import choose_template, describe_wanted
    from medusa_exporter.models import ModelSource, load_model, load_tokenizer
    from medusa_exporter.prompts import read_prompts
    from medusa_exporter.training.hidden_states import pick_device, pick_dtype

    def echo(line: str) -> None:
        click.echo(line, err=True)

    plan = Plan(
        conversations=tuple([turns for file in files for turns in read_prompts(file)][:limit]),
        excluded=tuple(turns for file in exclude for turns in read_prompts(file)),
        answers=tuple(found for file in answers for found in read_conversations(file)),
        synthesize=synthesize,
        follow_ups=follow_ups,
        temperatures=tuple(dict.fromkeys(temperature)),
        sampling=Sampling(top_k, top_p, min_p),
        max_new_tokens=max_new_tokens,
        context=context,
        rows=batch,
        seed=seed,
        chat_template=describe_wanted(chat_template),
    )
    if review_in and not (output / META_NAME).is_file():
        raise DataError(f"{output}: no finished data set; expected one: run the same command without --review-in first")
    source = ModelSource.resolve(model)
    device = pick_device(device)
    tokenizer = load_tokenizer(source)
    choose_template(tokenizer, chat_template)
    loaded = load_model(source, pick_dtype(dtype, device), device)
    found = distill(loaded, tokenizer, source.name, plan, output, minutes=minutes, echo=echo)
    if review_in:
        found, counts = read_review(found, tokenizer, review_in, context)
        save_data(found, output)
        echo(f"{', '.join(f'{count} {kind}' for kind, count in counts.items())} -> {output}")
    if review_out:
        written, foreign = write_review(found, tokenizer, review_out)
        left_out = f"; {foreign} that the chat template did not make are left out, and stay" if foreign else ""
        echo(f"{written} conversations{left_out} -> {review_out}")
