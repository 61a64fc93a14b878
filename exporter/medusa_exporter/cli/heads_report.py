"""`medusa-export heads-report`: measure how well heads predict, and fit trees to them."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import (
    data_option,
    device_option,
    dtype_option,
    heads_revision_option,
    revision_option,
)
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import note, warn
from medusa_exporter.output_kinds import FITTED, HEADS_REPORT, TREE
from medusa_exporter.overwrite_check import check_output_folder


@click.command(
    name="heads-report",
    cls=Command,
    example=(
        "medusa-export heads-report HuggingFaceTB/SmolLM2-135M-Instruct heads \\\n  --data data --write-profiles trees"
    ),
)
@click.argument("model")
@click.argument("heads")
@revision_option
@heads_revision_option
@data_option
@click.option(
    "--all",
    "every_row",
    is_flag=True,
    help="Use all conversations. Default: only those that training held out.",
)
@click.option(
    "--hold-out",
    default=0.02,
    show_default=True,
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Share of the conversations that training held out; the same value as for `medusa-export train`.",
)
@click.option(
    "--prompts",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help='JSON Lines file with "turns": use only conversations that begin with these prompts. May be repeated.',
)
@click.option(
    "--write-profiles",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Fit trees to all conversations used, and write them to FOLDER as tree-NODES.toml.",
)
@device_option
@dtype_option
@json_option("the report")
def command(
    model: str,
    heads: str,
    revision: str | None,
    heads_revision: str | None,
    folders: tuple[str, ...],
    every_row: bool,
    hold_out: float,
    files: tuple[str, ...],
    write_profiles: Path | None,
    device: str,
    dtype: str,
    results: Results,
) -> None:
    """Measure how well HEADS predict the tokens of MODEL on DATA, and fit trees to them.

    MODEL and HEADS are hub names or folders; MODEL may be a GGUF file. The report has the accuracy of each head and the
    best trees of several sizes. Only answers of greedy decoding count, if there are any. Trees are fitted on one half
    of the conversations and measured on the other; the number of nodes includes the root.
    """
    from medusa_exporter.training.report import SIZES

    trees = {f"tree-{nodes}.toml": TREE for nodes in SIZES}
    results.check(
        HEADS_REPORT, inputs=map(Path, files), outputs=[write_profiles / name for name in trees if write_profiles]
    )
    if write_profiles:
        check_output_folder(write_profiles, trees)

    from medusa_exporter.distillation.dataset import concatenate, load_data
    from medusa_exporter.heads.base_model import base_model_mismatch
    from medusa_exporter.heads.compatibility import check_heads
    from medusa_exporter.heads.storage import load_heads
    from medusa_exporter.hub import pin_revision
    from medusa_exporter.models import ModelSource, load_model, read_sizes
    from medusa_exporter.prompts import read_prompts
    from medusa_exporter.training import report
    from medusa_exporter.training.hidden_states import pick_device, pick_dtype

    source = ModelSource.resolve(model, revision)
    heads = pin_revision(heads, heads_revision)
    data = concatenate([load_data(folder) for folder in folders])
    device = pick_device(device)
    sizes = read_sizes(source)
    check_heads(heads, sizes.hidden_size, sizes.vocab_size, sizes.layers)
    if other := base_model_mismatch(heads, source.names):
        warn(other)
    loaded = load_model(source, pick_dtype(dtype, device), device)
    trained = load_heads(heads, loaded.config.hidden_size, loaded.config.vocab_size).to(device)
    name = source.name
    origin = f"{FITTED}{name} by heads {Path(heads).name}"
    found = report.evaluate_heads(
        loaded,
        trained,
        data,
        name=name,
        source=origin,
        hold_out=None if every_row else hold_out,
        opened_by=[turns for file in files for turns in read_prompts(file)],
    )
    results.write(HEADS_REPORT, found.facts())
    results.echo(report.format_report(found))
    if write_profiles:
        report.write_profiles(found.trees, write_profiles)
        names = ", ".join(tree.name for tree in found.trees.values())
        note(f"{names or 'no trees'}, fitted on {found.positions:,} positions -> {write_profiles}")
