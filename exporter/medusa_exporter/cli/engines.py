"""`medusa-export engines`: build the TensorRT engines of a bundle."""

from __future__ import annotations

from pathlib import Path

import click
from medusa_runtime.errors import BundleError

from medusa_exporter.build_inputs import read_manifest
from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import (
    backend_option,
    capacity_options,
    digest_option,
    gpu_option,
    list_option,
    precision_option,
)
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import Progress
from medusa_exporter.engines.add import add_engines
from medusa_exporter.engines.flavours import FLAVOURS
from medusa_exporter.output_kinds import SUMMARIES

KIND = SUMMARIES["engines"]


@click.command(name="engines", cls=Command, example="medusa-export engines bundle --backend tensorrt --precision fp16")
@click.argument("bundle", type=click.Path(path_type=Path))
@backend_option(
    "Kind of TensorRT to build for. Default: the one that the bundle has graphs for, if it has only one.",
    default=None,
    choices=FLAVOURS,
)
@precision_option
@digest_option
@capacity_options
@gpu_option
@list_option(
    "--step",
    "steps",
    metavar="NAME",
    help="Steps to build engines for: plain, prefill, or t followed by the number of nodes of a tree, e.g. t64. "
    "Default: every step that the bundle has a graph for.",
)
@click.option("--force", is_flag=True, help="Build engines again that are up to date.")
@json_option("the names of the engines")
def command(
    bundle: Path,
    backend: str | None,
    precision: str | None,
    max_length: int | None,
    static_capacity: int | None,
    targets: tuple[str, ...],
    gpu: int,
    steps: tuple[str, ...],
    force: bool,
    expected_digest: str | None,
    results: Results,
) -> None:
    """Build the TensorRT engines of BUNDLE that are missing or outdated, and write them into it.

    Neither torch nor ONNX Runtime is needed. An engine runs only with the version of TensorRT that built it, and only
    on the kind of GPU that it was built on (or, with tensorrt-rtx, built for). Each engine is written as soon as it is
    done, so a run that was interrupted continues with the next one.
    """
    results.check(KIND, bundle=bundle)
    progress = Progress()
    backend = backend or _only_backend(bundle)
    built = add_engines(
        bundle,
        backend,
        precision,
        max_length=max_length,
        static_capacity=static_capacity,
        targets=targets,
        steps=steps,
        force=force,
        gpu=gpu,
        expected_digest=expected_digest,
        report=progress.report,
    )
    seconds = round(progress.seconds, 1)
    results.write(KIND, {"bundle": str(bundle), "backend": backend, "engines": built, "seconds": seconds})
    results.echo(f"built {len(built)} engines in {seconds:.0f} s" if built else "all engines are up to date")


def _only_backend(bundle: Path) -> str:
    """Return the kind of TensorRT that the bundle has graphs for. Raises BundleError if there is not exactly one."""
    found = sorted({graph.backend for graph in read_manifest(bundle).graphs.values()} & set(FLAVOURS))
    if len(found) != 1:
        has = ", ".join(found) or "neither"
        raise BundleError(f"{bundle} has graphs for {has} of {', '.join(FLAVOURS)}; name one with --backend")
    return found[0]
