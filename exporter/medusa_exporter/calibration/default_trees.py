"""Chooses the default tree of each graph of a new bundle by measuring on the machine that builds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from medusa_runtime.bundle import Bundle, rewrite_manifest
from medusa_runtime.calibration import GraphCalibration
from medusa_runtime.errors import MedusaError
from medusa_runtime.manifest import Manifest
from medusa_runtime.profile_choice import fastest

from medusa_exporter.built_in_prompts import BUILT_IN_PROMPTS
from medusa_exporter.calibration.calibrate import Plan, calibrate_graph, keep
from medusa_exporter.console import Progress

SECONDS = 30.0  # of timing steps, for each graph
MAX_NEW_TOKENS = 64


def choose_default_trees(folder: Path, report: Callable[[str], None]) -> Manifest:
    """Measure each graph of a bundle with the built-in prompts, and write the fastest trees into its manifest.

    Graphs that cannot run here keep their default. The calibrations are kept in the user's cache.

    Args:
        folder: A complete bundle that nobody uses yet.
        report: Called with a line for each graph.

    Raises:
        BundleError: The bundle is damaged.
    """
    bundle, progress = Bundle.open(folder), Progress()
    trees = bundle.profiles().values()
    graphs = dict(bundle.manifest.graphs)
    plan = Plan(SECONDS, BUILT_IN_PROMPTS, MAX_NEW_TOKENS)
    measured: list[GraphCalibration] = []
    for key, graph in graphs.items():
        try:
            found = calibrate_graph(bundle, graph, plan, SECONDS, progress)
        except MedusaError as error:
            report(f"{key} keeps its default tree, {graph.profile}: it cannot be measured here: {error}")
            continue
        if (best := fastest(found, trees)) is not None:
            graphs[key] = replace(graph, profile=best.profile.name)
            report(f"{key}: {best.profile.name} is the fastest tree, {best.speedup:.2f} times plain decoding expected")
            measured.append(found)
    report(
        "warning: the default trees were chosen by measuring the machine that builds, with the built-in prompts; "
        "run medusa-export calibrate on the machine that decodes, with prompts of your own"
    )
    manifest = rewrite_manifest(folder, replace(bundle.manifest, graphs=graphs, digest=""), bundle.manifest.files)
    for found in measured:
        keep(replace(found, bundle=manifest.digest), report)
    return manifest
