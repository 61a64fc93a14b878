"""`medusa-export heads`: convert Medusa heads from any published layout."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medusa_exporter.cli.command import Group
from medusa_exporter.cli.options import heads_output_option
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import warn
from medusa_exporter.output_kinds import CONVERTED, SUMMARIES
from medusa_exporter.wording import counted

if TYPE_CHECKING:
    from medusa_exporter.heads.convert import Conversion


KIND = SUMMARIES["heads convert"]


@click.group(name="heads", cls=Group)
def command() -> None:
    """Convert Medusa heads from any published layout."""


@command.command(name="convert", example="medusa-export heads convert medusa_lm_head.pt -o heads --base vicuna-7b")
@click.argument("source")
@click.option(
    "--revision",
    metavar="REVISION",
    help="Branch, tag or commit of SOURCE on the Hugging Face hub. Default: its main branch.",
)
@heads_output_option
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Folder of the model that the heads belong to. The heads' sizes are checked against it, and lm_heads that "
    "equal the model's own are left out.",
)
@click.option("--force", is_flag=True, help="Overwrite heads that this command wrote to HEADS before.")
@json_option("the architecture of the heads")
def convert_command(
    source: str, revision: str | None, output: Path, base: Path | None, force: bool, results: Results
) -> None:
    """Convert the heads in SOURCE, in any published layout, and write them to HEADS in the layout of `train`.

    SOURCE is a folder, a hub name, or a file that ends in .pt, .pth or .bin. These layouts are recognised: those of the
    Medusa authors (v0.1 pickles, v1.0 merged with the model, version 2), TGI, vLLM, ModelOpt and TensorRT-LLM. This is
    the only command that reads pickles; it reads tensors from them, refuses anything else and runs no code.
    """
    results.check(KIND, outputs=[output / name for name in CONVERTED])
    from medusa_exporter.heads.convert import convert
    from medusa_exporter.hub import pin_revision

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = convert(pin_revision(source, revision, "--revision"), output, base=base, force=force)
    for warning in caught:
        warn(str(warning.message))
    facts, layout = asdict(converted.facts), converted.layout.title
    results.write(KIND, {"output": str(output), "layout": layout, "shared_lm_head": converted.shared, "heads": facts})
    results.echo(f"{_found(converted)}\nwrote {output}")


def _found(converted: Conversion) -> str:
    facts = converted.facts
    own = f"own lm_heads of {facts.own_lm_head_size} tokens" if facts.own_lm_head_size else "the model's lm_head"
    draft = f"draft vocabulary of {facts.draft_vocabulary} tokens" if facts.draft_vocabulary else "whole vocabulary"
    taps = f", {counted(facts.taps, 'tapped layer')}" if facts.taps else ""
    trunk = f", trunk of width {facts.trunk}" if facts.trunk else ""
    return (
        f"found {counted(facts.heads, 'head')} of {counted(facts.layers, 'layer')}, hidden size "
        f"{facts.hidden_size}, conditioning {facts.conditioning}"
        f"{taps}{trunk}, {draft}, {own}{' (own ones equalled it and were left out)' if converted.shared else ''}, "
        f"in {converted.layout.title}"
    )
