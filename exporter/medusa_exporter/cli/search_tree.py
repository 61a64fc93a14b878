"""`medusa-export search-tree`: find the fastest tree for this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from medusa_profiles.toml import to_toml
from medusa_runtime.backends import load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.calibration import Acceptance, GraphCalibration
from medusa_runtime.calibration_cache import find_graph, read_cached
from medusa_runtime.errors import BundleError, CalibrationError
from medusa_runtime.profile_choice import Expectation, exact_trees, expect_all

from medusa_exporter.calibration.table import expectations_table
from medusa_exporter.calibration.tree_search import search_trees, with_source
from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import (
    backend_option,
    calibration_option,
    digest_option,
    gpu_option,
    precision_option,
    threads_option,
)
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import note
from medusa_exporter.files import write_bytes
from medusa_exporter.output_kinds import SEARCHED_TREE, SUMMARIES
from medusa_exporter.overwrite_check import check_output_file

KIND = SUMMARIES["search-tree"]


@click.command(
    name="search-tree", cls=Command, example="medusa-export search-tree bundle --precision int8 -o best.toml"
)
@click.argument("bundle", type=click.Path(path_type=Path))
@backend_option("Backend whose calibration to use.")
@precision_option
@calibration_option
@threads_option
@gpu_option
@digest_option
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.toml",
    help="Write the fastest tree to FILE.toml, which --profile of generate, bench, verify and build accepts.",
)
@json_option("the trees")
def command(
    bundle: Path,
    backend: str,
    precision: str | None,
    calibration: Path | None,
    threads: int | None,
    gpu: int,
    output: Path | None,
    expected_digest: str | None,
    results: Results,
) -> None:
    """Find the tree that decodes BUNDLE fastest on this machine, from what `medusa-export calibrate` has measured.

    For every size, the tree with the most tokens per step is fitted to one half of the answers that calibrate has
    recorded; the other half tells what to expect of it, and of the bundle's own trees. The fastest is the one with the
    most tokens per millisecond. In quantised precisions only chains are searched, whose tokens are exactly those of
    plain decoding.
    """
    inputs = [calibration] if calibration else []
    results.check(KIND, inputs=inputs, outputs=[output] if output else [], bundle=bundle)
    if output is not None:
        check_output_file(output, SEARCHED_TREE, inputs=inputs, bundle=bundle)
        if output.suffix != ".toml":
            raise click.BadParameter(f"got {str(output)!r:.80}, expected a name that ends in .toml: --profile needs it")
    opened = Bundle.open(bundle, expected_digest=expected_digest)
    if not opened.heads.count:
        raise BundleError(f"{bundle} has no heads, so there is no tree to search; build it with --heads")
    graph = opened.graph(backend, precision)[0]
    digest = opened.manifest.digest
    if calibration is not None:
        measured: GraphCalibration | None = find_graph(calibration, digest, graph.key)
    else:
        loaded = load_backend(opened, backend, precision, threads, gpu=gpu)  # which names the device
        measured = read_cached(digest, graph.key, loaded)
    measured, acceptance = _complete(measured, f"{bundle} --backend {backend} --precision {graph.precision}")
    searched = search_trees(measured, acceptance)
    if not searched:
        raise CalibrationError(
            f"the calibration has {len(acceptance.answers)} answers, too few to fit a tree on one half of the "
            "conversations and to check it on the other; calibrate with more prompts"
        )
    best = max(searched, key=lambda one: one.speedup)
    tree = with_source(best, measured, acceptance, opened.model.name)
    own = expect_all(measured, exact_trees(graph.precision, opened.profiles().values()), check=True)
    results.write(KIND, {"best": tree.name, "trees": [*map(_facts, searched)], "bundle": [*map(_facts, own)]})
    results.echo("\n".join([expectations_table([*searched, *own]), _verdict(best, own)]))
    if output is not None:
        write_bytes(output, to_toml(tree).encode())
        note(f"{tree.name} -> {output}")


def _complete(found: GraphCalibration | None, options: str) -> tuple[GraphCalibration, Acceptance]:
    """Return a calibration that has an acceptance, and the acceptance. Raises CalibrationError."""
    if found is not None and found.acceptance is not None:
        return found, found.acceptance
    has = "no calibration for this machine" if found is None else "a calibration of step times only"
    raise CalibrationError(
        f"there is {has}, expected one with the heads' accuracy; measure it: medusa-export calibrate {options} "
        "--prompts FILE (with the same --threads)"
    )


def _verdict(best: Expectation, own: Sequence[Expectation]) -> str:
    if best.speedup <= 1:
        return "plain decoding is the fastest on this machine: no tree gains more tokens than its steps take time"
    found = f"fastest: {best.profile.name}, {best.speedup:.2f} times as fast as plain decoding"
    rival = max(own, key=lambda one: one.speedup, default=best)
    if rival.speedup <= best.speedup:
        return found
    return f"{found}; the bundle's {rival.profile.name} is expected to be faster: more prompts would fit a better tree"


def _facts(found: Expectation) -> dict[str, Any]:
    return {
        "name": found.profile.name,
        "nodes": found.profile.size,
        "depth": found.profile.depth,
        "tokens_per_step": found.tokens_per_step,
        "step_ms": found.step_ms,
        "overhead": found.overhead,
        "speedup": found.speedup,
        "paths": [list(path) for path in found.profile.paths],
    }
