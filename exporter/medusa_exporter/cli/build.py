"""`medusa-export build`: make a bundle."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType

import click

from medusa_exporter.build import BACKENDS, build
from medusa_exporter.build_inputs import read_manifest
from medusa_exporter.cli.options import Progress, capacity_options, chat_template_option, gpu_option, split_commas
from medusa_exporter.engines import flavours
from medusa_exporter.engines.add import add_engines, find_targets
from medusa_exporter.engines.flavours import FLAVOURS
from medusa_exporter.engines.step_sizes import capacity
from medusa_exporter.precisions import PRECISIONS, choose


@click.command(name="build")
@click.argument("model")
@click.option("--heads", required=True, help="Folder or hub name of the Medusa heads.")
@click.option("-o", "--output", "bundle", required=True, type=click.Path(path_type=Path), help="The bundle's folder.")
@click.option(
    "--backend", "backends", multiple=True, default=BACKENDS, callback=split_commas, show_default=True, help="Backends."
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    callback=split_commas,
    help="One graph each: "
    + "; ".join(f"{backend} runs {', '.join(served)}" for backend, served in PRECISIONS.items())
    + ". Default: the first of each backend.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    callback=split_commas,
    help="Trees: names of shipped ones or .toml files. Default: every shipped tree that the heads reach.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sequences that a step of TensorRT's engines takes. More than one is for callers of the backend itself: the "
    "decoder takes one.",
)
@chat_template_option
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens that a prompt and its answer may come to, at most what the model supports. Graphs hold a table of "
    "that length, and a GPU allocates memory for it. Default: the model's max_position_embeddings.",
)
@capacity_options
@gpu_option
@click.option(
    "--no-engines",
    is_flag=True,
    help="Leave TensorRT's engines to medusa-export engines, on the machine that runs them.",
)
@click.option("--force", is_flag=True, help="Build even where nothing has changed.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON on standard output.")
def command(
    model: str,
    heads: str,
    bundle: Path,
    backends: tuple[str, ...],
    precisions: tuple[str, ...],
    profiles: tuple[str, ...],
    batch: int,
    chat_template: str | None,
    context: int | None,
    max_length: int | None,
    static_capacity: int | None,
    targets: tuple[str, ...],
    gpu: int,
    no_engines: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Build a bundle from MODEL: a hub name, a local folder or a GGUF file.

    A second run with nothing changed does nothing (files are compared by size and time; a hub name counts as
    unchanged). Progress goes to standard error. Options that take a list may be repeated or comma-separated.
    """
    signal.signal(signal.SIGTERM, _stop)
    with_engines = [] if no_engines else [backend for backend in dict.fromkeys(backends) if backend in FLAVOURS]
    for backend in with_engines:  # before minutes of work
        find_targets(flavours.find(backend), targets, gpu)
        if static_capacity:
            capacity(max_length or static_capacity, static_capacity)
    progress = Progress()
    result = build(
        model,
        heads,
        bundle,
        backends=backends,
        precisions=precisions,
        profiles=profiles,
        batch=batch,
        chat_template=chat_template,
        context=context,
        force=force,
        report=progress.report,
    )
    engines: list[str] = []
    for backend, precision in choose(backends, precisions):
        if backend in with_engines:
            engines += add_engines(
                bundle,
                backend,
                precision,
                max_length=max_length,
                static_capacity=static_capacity,
                targets=targets,
                force=force,
                gpu=gpu,
                report=progress.report,
            )
    seconds = round(progress.seconds, 1)
    manifest = read_manifest(bundle)
    size = sum(facts.size for facts in manifest.files.values())
    if as_json:
        click.echo(
            json.dumps(
                {
                    "bundle": str(bundle),
                    "built": result.built,
                    "seconds": seconds,
                    "bytes": size,
                    "engines": engines,
                    "graphs": sorted(manifest.graphs),
                    "profiles": list(manifest.profiles),
                    "digest": manifest.digest,
                }
            )
        )
    elif result.built or engines:
        click.echo(f"built {bundle}: {size / 1e6:.0f} MB, {len(manifest.profiles)} profiles, {seconds} s")
    else:
        click.echo(f"{bundle} is up to date; --force builds it again")


def _stop(_signal: int, _frame: FrameType | None) -> None:
    """Let a terminated build clean up as an interrupted one does."""
    raise KeyboardInterrupt
