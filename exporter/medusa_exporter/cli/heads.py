"""`medusa-export heads`: what can be done with heads by themselves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from medusa_exporter.heads.convert import Conversion


@click.group(name="heads")
def command() -> None:
    """Convert heads between layouts."""


@command.command(name="convert")
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="HEADS")
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="MODEL_FOLDER",
    help="The model they are for: check its sizes, and leave out lm_heads that equal its own.",
)
@click.option("--force", is_flag=True, help="Overwrite the heads in HEADS.")
def convert_command(source: str, output: Path, base: Path | None, force: bool) -> None:
    """Write the heads of SOURCE, in any published layout, into HEADS in the one that `train` writes.

    SOURCE is a folder, a hub name or a file ending in .pt, .pth or .bin: the Medusa authors' (v0.1 pickles, v1.0 merged
    with the model, version 2), TGI's, vLLM's, ModelOpt's or TensorRT-LLM's. Pickles are read by this command alone,
    as tensors and nothing else; what else they hold is refused and never run.
    """
    from medusa_exporter.heads.convert import convert

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = convert(source, output, base=base, force=force)
    for warning in caught:
        click.echo(f"warning: {warning.message}", err=True)
    click.echo(_found(converted))
    click.echo(f"wrote {output}")


def _found(converted: Conversion) -> str:
    facts = converted.facts
    own = f"own lm_heads of {facts.own_lm_head_size} tokens" if facts.own_lm_head_size else "the model's lm_head"
    draft = f"draft vocabulary of {facts.draft_vocabulary} tokens" if facts.draft_vocabulary else "whole vocabulary"
    taps = f", {facts.taps} tapped layer{'' if facts.taps == 1 else 's'}" if facts.taps else ""
    trunk = f", trunk of width {facts.trunk}" if facts.trunk else ""
    return (
        f"found {facts.heads} head{'' if facts.heads == 1 else 's'} of {facts.layers} "
        f"layer{'' if facts.layers == 1 else 's'}, hidden size {facts.hidden_size}, conditioning {facts.conditioning}"
        f"{taps}{trunk}, {draft}, {own}{' (theirs equalled it and was left out)' if converted.shared else ''}, "
        f"in {converted.layout.title}"
    )
