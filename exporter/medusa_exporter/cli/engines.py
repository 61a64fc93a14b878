"""`medusa-export engines`: build a bundle's TensorRT engines, where they are to run or ahead of time."""

from __future__ import annotations

from pathlib import Path

import click
from medusa_runtime.errors import BundleError

from medusa_exporter.build_inputs import read_manifest
from medusa_exporter.cli.options import (
    Progress,
    capacity_options,
    digest_option,
    gpu_option,
    precision_option,
    split_commas,
)
from medusa_exporter.engines.add import add_engines
from medusa_exporter.engines.flavours import FLAVOURS


@click.command(name="engines")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend", type=click.Choice(FLAVOURS), help="Default: the one whose graphs the bundle has, if it is one."
)
@precision_option
@digest_option
@capacity_options
@gpu_option
@click.option(
    "--step",
    "steps",
    multiple=True,
    callback=split_commas,
    help="Of plain, prefill, t<nodes>. Default: all of the bundle.",
)
@click.option("--force", is_flag=True, help="Build even those that are up to date.")
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
) -> None:
    """Build the engines of BUNDLE that are missing or stale; neither torch nor ONNX Runtime is needed.

    An engine runs on the version of TensorRT that built it alone, and on the kind of GPU that it was built on (or, with
    tensorrt-rtx, for). Each is in its place as soon as it is done. Progress goes to standard error.
    """
    progress = Progress()
    if backend is None:
        found = sorted({one.backend for one in read_manifest(bundle).graphs.values()} & set(FLAVOURS))
        if len(found) != 1:
            has = ", ".join(found) or "neither"
            raise BundleError(f"{bundle} has graphs for {has} of {', '.join(FLAVOURS)}; name one with --backend")
        backend = found[0]
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
    click.echo(f"built {len(built)} engines in {progress.seconds:.0f} s" if built else "all engines are up to date")
