"""`medusa-export heads-report`: how well heads guess, and the trees that suit them."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_exporter.files import write_json
from medusa_exporter.output_kinds import FITTED, HEADS_REPORT, TREE
from medusa_exporter.overwrite_check import check_output_file, check_output_folder


@click.command(name="heads-report")
@click.argument("model")
@click.argument("heads")
@click.option(
    "--data", "folders", multiple=True, required=True, type=click.Path(exists=True, file_okay=False), metavar="DATA"
)
@click.option("--all", "every_row", is_flag=True, help="Judge on all rows, not only those held back from training.")
@click.option("--hold-out", default=0.02, show_default=True, type=click.FloatRange(0, 1), help="As given to train.")
@click.option("--prompts", "files", multiple=True, type=click.Path(exists=True, dir_okay=False), metavar="FILE")
@click.option("--write-profiles", type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 …")
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(["auto", "float32", "bfloat16"]))
def command(
    model: str,
    heads: str,
    folders: tuple[str, ...],
    every_row: bool,
    hold_out: float,
    files: tuple[str, ...],
    write_profiles: Path | None,
    json_file: Path | None,
    device: str,
    dtype: str,
) -> None:
    """Judge HEADS of MODEL on the rows of DATA that training held back: accuracy per head, and the best trees.

    Greedy rows only, where there are any; with --prompts only conversations that these open. Trees are fitted on one
    half of the conversations and checked on the other; nodes count the root. --write-profiles fits trees on both halves
    and writes them as tree-{nodes}.toml.
    """
    from medusa_exporter.training.report import SIZES

    if json_file:
        check_output_file(json_file, HEADS_REPORT, inputs=map(Path, files))
    if write_profiles:
        check_output_folder(write_profiles, {f"tree-{nodes}.toml": TREE for nodes in SIZES})

    from medusa_exporter.distillation.dataset import concatenate, load_data
    from medusa_exporter.heads.base_model import base_model_mismatch
    from medusa_exporter.heads.compatibility import check_heads
    from medusa_exporter.heads.storage import load_heads
    from medusa_exporter.models import ModelSource, load_model, read_sizes
    from medusa_exporter.prompts import read_prompts
    from medusa_exporter.training import report
    from medusa_exporter.training.hidden_states import pick_device, pick_dtype

    source = ModelSource.resolve(model)
    data = concatenate([load_data(folder) for folder in folders])
    device = pick_device(device)
    sizes = read_sizes(source)
    check_heads(heads, sizes.hidden_size, sizes.vocab_size, sizes.layers)
    if other := base_model_mismatch(heads, source.names):
        click.echo(f"warning: {other}", err=True)
    loaded = load_model(source, pick_dtype(dtype, device), device)
    trained = load_heads(heads, loaded.config.hidden_size, loaded.config.vocab_size).to(device)
    name = source.name
    origin = f"{FITTED}{name} by heads {Path(heads).name}"
    found = report.report(
        loaded,
        trained,
        data,
        name=name,
        source=origin,
        hold_out=None if every_row else hold_out,
        opened_by=[turns for file in files for turns in read_prompts(file)],
    )
    click.echo(report.as_text(found))
    if json_file:
        write_json(json_file, HEADS_REPORT.marked(found.facts()))
    if write_profiles:
        report.write_profiles(found.trees, write_profiles)
