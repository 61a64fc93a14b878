"""`medusa-export report`: one page of what `bench` measured."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_exporter.files import write_bytes
from medusa_exporter.output_kinds import REPORT
from medusa_exporter.overwrite_check import check_output_file
from medusa_exporter.report.page import render
from medusa_exporter.report.runs import read_runs


@click.command(name="report")
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="JSON..."
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The HTML file to write.")
def command(files: tuple[Path, ...], output: Path) -> None:
    """Write one page of what `medusa-export bench --json` measured, of several runs where several files are given.

    So backends that do not share a Python are joined: measure in each, then report in one. The page is a single HTML
    file that needs no network. Ratios between different runs are marked: only within a run did backends take turns.
    """
    check_output_file(output, REPORT, inputs=files)
    runs = read_runs(files)
    text = render(runs)
    write_bytes(output, text.encode())
    cells = sum(len(run.cells) for run in runs)
    click.echo(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {cells} results, {len(text) / 1e3:.0f} kB")
