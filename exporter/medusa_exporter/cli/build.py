"""`medusa-export build`: build a bundle from a model and, if it has any, its Medusa heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from medusa_runtime.manifest import Manifest

from medusa_exporter.build import DEFAULT_BACKENDS, BuildResult, build
from medusa_exporter.build_inputs import read_manifest
from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import (
    BACKEND_NAMES,
    capacity_options,
    chat_template_option,
    gpu_option,
    heads_revision_option,
    list_option,
    revision_option,
)
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import Progress
from medusa_exporter.engines import flavours
from medusa_exporter.engines.add import add_engines, find_targets
from medusa_exporter.engines.flavours import FLAVOURS
from medusa_exporter.engines.step_sizes import choose_capacity
from medusa_exporter.output_kinds import SUMMARIES
from medusa_exporter.precisions import PRECISIONS, choose_pairs

ALL_PRECISIONS = tuple(dict.fromkeys(precision for served in PRECISIONS.values() for precision in served))

KIND = SUMMARIES["build"]


@click.command(
    name="build",
    cls=Command,
    example=(
        "medusa-export build HuggingFaceTB/SmolLM2-135M-Instruct \\\n"
        "  --heads heads/smollm2-135m-instruct -o bundle --precision int8"
    ),
)
@click.argument("model")
@revision_option
@click.option(
    "--heads",
    metavar="HEADS",
    help="Folder or hub name of the Medusa heads. Default: a bundle without heads, which has no trees; it is decoded "
    "plainly, or with drafts that are copied from the text.",
)
@heads_revision_option
@click.option(
    "-o",
    "--output",
    "bundle",
    required=True,
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Folder to write the bundle to.",
)
@list_option(
    *BACKEND_NAMES,
    "backends",
    metavar="NAME",
    kind=click.Choice(list(PRECISIONS)),
    default=DEFAULT_BACKENDS,
    show_default=True,
    help=f"Backends to build graphs for: {', '.join(PRECISIONS)}.",
)
@list_option(
    "--precision",
    "precisions",
    metavar="NAME",
    kind=click.Choice(ALL_PRECISIONS),
    help="Precisions to build; each is a separate graph. "
    + "; ".join(f"{backend} runs {', '.join(served)}" for backend, served in PRECISIONS.items())
    + ". Default: the first one of each backend.",
)
@list_option(
    "--profile",
    "profiles",
    metavar="NAME|FILE|auto",
    help="Trees to put into the bundle: names that `medusa-export profiles` lists, or .toml files. Default: every "
    "listed tree that is no deeper than the number of heads. With auto among them, or alone, the default tree of each "
    "graph is chosen by measuring on this machine.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    default=1,
    show_default=True,
    help="Number of sequences in one step of a TensorRT engine. More than 1 is for programs that call the backend "
    "themselves: the decoder runs one sequence.",
)
@chat_template_option
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Maximum number of tokens of a prompt and its answer together, at most what the model supports. The graphs "
    "store a table of that length, and a GPU allocates memory for it. Default: the model's max_position_embeddings.",
)
@capacity_options
@gpu_option
@click.option(
    "--no-engines",
    is_flag=True,
    help="Do not build TensorRT engines. Run `medusa-export engines` later, on the machine that will run them.",
)
@click.option("--force", is_flag=True, help="Build again even if nothing has changed.")
@json_option("a summary of the bundle")
def command(
    model: str,
    revision: str | None,
    heads: str | None,
    heads_revision: str | None,
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
    results: Results,
) -> None:
    """Build a bundle from MODEL: a hub name, a local folder or a GGUF file.

    A bundle is a folder with one ONNX graph for each backend and precision, the tokenizer, and the trees. It appears as
    a whole: an interrupted build leaves the previous bundle, or none. A second run does nothing unless MODEL, the heads
    or an option has changed; files are compared by size and time, and a hub name with its revision counts as unchanged.
    """
    results.check(KIND, inputs=[Path(model)] if Path(model).is_file() else [], bundle=bundle)
    with_engines = () if no_engines else tuple(backend for backend in backends if backend in FLAVOURS)
    for backend in with_engines:  # a wrong target or capacity is refused before minutes of work
        find_targets(flavours.find_flavour(backend), targets, gpu)
        if static_capacity:
            choose_capacity(max_length or static_capacity, static_capacity)
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
        revision=revision,
        heads_revision=heads_revision,
        force=force,
        report=progress.report,
    )
    engines: list[str] = []
    for backend, precision in choose_pairs(backends, precisions):
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
    manifest = read_manifest(bundle)
    results.write(KIND, _summary(result, manifest, engines, progress.seconds))
    if result.built or engines:
        size = sum(facts.size for facts in manifest.files.values()) / 1e6
        results.echo(f"built {bundle}: {size:.0f} MB, {len(manifest.profiles)} profiles, {progress.seconds:.1f} s")
    else:
        results.echo(f"{bundle} is up to date; --force builds it again")


def _summary(result: BuildResult, manifest: Manifest, engines: list[str], seconds: float) -> dict[str, Any]:
    return {
        "bundle": str(result.bundle),
        "built": result.built,
        "seconds": round(seconds, 1),
        "bytes": sum(facts.size for facts in manifest.files.values()),
        "engines": engines,
        "graphs": sorted(manifest.graphs),
        "profiles": list(manifest.profiles),
        "digest": manifest.digest,
    }
