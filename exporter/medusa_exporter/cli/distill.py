"""`medusa-export distill`: let the model answer prompts."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="distill")
@click.argument("model")
@click.option("--prompts", "files", multiple=True, type=click.Path(exists=True, dir_okay=False), metavar="FILE")
@click.option("--exclude", multiple=True, type=click.Path(exists=True, dir_okay=False), metavar="FILE")
@click.option("--synthesize", default=0, type=click.IntRange(0), help="User turns that the model writes itself.")
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DATA")
@click.option("--max-new-tokens", default=320, show_default=True, type=click.IntRange(2), help="Per answer.")
@click.option("--context", default=768, show_default=True, type=click.IntRange(8), help="Prompt and answer together.")
@click.option("--temperature", multiple=True, default=(0.0,), type=click.FloatRange(0, 10), help="0 is greedy.")
@click.option("--batch", default=256, show_default=True, type=click.IntRange(1), help="Answers written at once.")
@click.option("--limit", type=click.IntRange(1), help="At most so many prompts of the files.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Begin no further answer after that long.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 …")
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(["auto", "float32", "bfloat16"]))
def command(
    model: str,
    files: tuple[str, ...],
    exclude: tuple[str, ...],
    synthesize: int,
    output: Path,
    max_new_tokens: int,
    context: int,
    temperature: tuple[float, ...],
    batch: int,
    limit: int | None,
    minutes: float | None,
    seed: int,
    device: str,
    dtype: str,
) -> None:
    """Let MODEL answer prompts (and prompts of its own with --synthesize): the data that heads are trained on.

    FILE holds JSON lines with "turns", a list of user messages. --temperature may be given several times: one pass
    over all prompts each. --exclude leaves out prompts that equal one of that file's. A run broken off goes on when
    the same command is given again.
    """
    if not files and not synthesize:
        raise click.UsageError("nothing to answer: give --prompts FILE or --synthesize N")
    if max_new_tokens >= context:
        raise click.UsageError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in --context {context}")

    from medusa_exporter.heads.backbone import pick_device, pick_dtype
    from medusa_exporter.heads.distill import Plan, distill
    from medusa_exporter.heads.prompts import read_prompts
    from medusa_exporter.models import ModelSource, load_model, load_tokenizer

    plan = Plan(
        conversations=tuple([turns for file in files for turns in read_prompts(file)][:limit]),
        excluded=tuple(turns for file in exclude for turns in read_prompts(file)),
        synthesize=synthesize,
        temperatures=tuple(dict.fromkeys(temperature)),
        max_new_tokens=max_new_tokens,
        context=context,
        seed=seed,
    )
    source = ModelSource.resolve(model)
    device = pick_device(device)
    loaded = load_model(source, pick_dtype(dtype, device), device)
    distill(
        loaded,
        load_tokenizer(source),
        source.name,
        plan,
        output,
        rows=batch,
        minutes=minutes,
        echo=lambda line: click.echo(line, err=True),
    )
