"""`medusa-export report`: write an HTML page of the results of `bench`."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import INPUT_FILE
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import readable
from medusa_exporter.files import write_bytes
from medusa_exporter.output_kinds import REPORT, SUMMARIES
from medusa_exporter.overwrite_check import check_output_file
from medusa_exporter.report.page import render_page
from medusa_exporter.report.runs import read_runs

KIND = SUMMARIES["report"]


@click.command(name="report", cls=Command, example="medusa-export report cpu.json gpu.json -o report.html")
@click.argument("files", nargs=-1, required=True, type=INPUT_FILE, metavar="JSON...")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="HTML file to write.",
)
@json_option("a summary of the page")
def command(files: tuple[Path, ...], output: Path, results: Results) -> None:
    """Write one HTML page of what `medusa-export bench --json` measured, with plots and tables.

    Several JSON files become one page. Backends that cannot be installed into one Python environment are compared that
    way: measure in each environment, then report in one. The page needs no network. Ratios between different runs are
    marked, because only within a run did backends answer in alternation.
    """
    check_output_file(output, REPORT, inputs=files)
    results.check(KIND, inputs=files, outputs=[output])
    runs = read_runs(files)
    page = readable(render_page(runs)).encode()
    write_bytes(output, page)
    cells = sum(len(run.results) for run in runs)
    results.write(KIND, {"output": str(output), "runs": len(runs), "results": cells, "bytes": len(page)})
    results.echo(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {cells} results, {len(page) / 1e3:.0f} kB")
