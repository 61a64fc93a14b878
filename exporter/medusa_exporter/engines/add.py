"""Builds the engines that a bundle lacks or whose graphs have changed, and adds each to the bundle when it is built.

An engine is added as a new bundle is published: all files are written to a staging folder, sealed, and swapped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medusa_runtime.bundle import Bundle, rewrite_manifest
from medusa_runtime.engine_manifest import EngineManifest
from medusa_runtime.errors import BundleError
from medusa_runtime.manifest import Manifest

from medusa_exporter.engines import FOLDER, flavours
from medusa_exporter.engines.builder import BuiltEngine, build_engine
from medusa_exporter.engines.flavours import Flavour
from medusa_exporter.engines.reuse import external_files
from medusa_exporter.engines.step_sizes import Capacity, choose_capacity, step_name
from medusa_exporter.engines.timing import step_ms
from medusa_exporter.publish import link_or_copy, lock_bundle, replace_bundle
from medusa_exporter.staging import Staging

Report = Callable[[str], None]


@dataclass(frozen=True)
class EngineOptions:
    """How engines are to be built.

    Attributes:
        capacity: Range of rows of the past.
        targets: Compute capabilities to build for.
        gpu: Number of the GPU to build on, if the flavour needs one.
    """

    capacity: Capacity
    targets: tuple[str, ...] = ()
    gpu: int = 0


def add_engines(
    folder: Path,
    backend: str,
    precision: str | None = None,
    *,
    max_length: int | None = None,
    static_capacity: int | None = None,
    targets: Sequence[str] = (),
    steps: Sequence[str] = (),
    force: bool = False,
    gpu: int = 0,
    expected_digest: str | None = None,
    report: Report = lambda _line: None,
) -> list[str]:
    """Build the engines that a bundle lacks for a backend, one for each of its graphs, and add them to the bundle.

    Args:
        folder: The bundle.
        backend: "tensorrt" or "tensorrt-rtx".
        precision: Precision of the graphs; None for the bundle's default.
        max_length: Number of tokens that a sequence may have; None for the model's context.
        static_capacity: Build for this one number of rows of the past, and not for a range.
        targets: Compute capabilities to build for, such as "sm86", if the backend builds ahead of time.
        steps: Names of the step sizes to build for ("plain", "prefill", "t64"); empty for all that have graphs.
        force: Build engines that are up to date too.
        gpu: Number of the GPU that TensorRT builds on.
        expected_digest: Digest that the bundle's manifest must have; None for any.
        report: Called with a line as each engine begins and ends.

    Returns:
        The names of the engines that were built.

    Raises:
        BundleError: If there is no such bundle or graph, or an engine cannot be built.
        MissingExtraError: If the backend is not installed.
    """
    flavour = flavours.find_flavour(backend)
    if not folder.is_dir():
        raise BundleError(f"no such bundle: {folder} is not a folder; make one with medusa-export build")
    with lock_bundle(folder, report) as staging:
        bundle = Bundle.open(folder, weights=True, expected_digest=expected_digest)
        facts, _ = bundle.graph(backend, precision)
        _check_operators(bundle, flavour)
        length = min(max_length or bundle.model.context, bundle.model.context)
        options = EngineOptions(choose_capacity(length, static_capacity), find_targets(flavour, targets, gpu), gpu)
        added, manifest = [], bundle.manifest
        graphs = _chosen_graphs(bundle, facts.key, steps)
        for number, graph in enumerate(graphs, start=1):
            name, progress = _engine_name(graph), f"engine {number} of {len(graphs)}"
            if not force and _is_up_to_date(bundle, graph, flavour, options):
                report(f"{progress}: {name} is up to date")
                continue
            report(f"{progress}: build {name} for {', '.join(options.targets)} (minutes for many layers)")
            manifest = _add_engine(staging, manifest, flavour, graph, facts.precision, options, report)
            added.append(name)
    return added


def _engine_name(graph: str) -> str:
    """Return the path of a graph's engine in the bundle, without the suffix."""
    return f"{FOLDER}/{Path(graph).stem}"


def _add_engine(
    staging: Staging,
    manifest: Manifest,
    flavour: Flavour,
    graph: str,
    precision: str,
    options: EngineOptions,
    report: Report,
) -> Manifest:
    """Build the engine of one graph and add it to the bundle; return the bundle's new manifest."""
    started = time.monotonic()
    cache = f"{FOLDER}/{flavour.name}-{flavour.version}.cache"
    built = build_engine(
        flavour,
        staging.target / graph,
        precision,
        options.capacity,
        options.targets if flavour.ahead_of_time else (),
        timing_cache=(staging.target / cache).read_bytes() if cache in manifest.files else b"",
        report=report,
    )
    seconds = round(time.monotonic() - started, 1)
    facts = _engine_facts(staging, manifest, flavour, graph, precision, options, built, seconds)
    content = {f"{_engine_name(graph)}.engine": built.engine}
    if built.timing_cache is not None:
        content[cache] = built.timing_cache
    with replace_bundle(staging) as folder:
        facts_file = f"{_engine_name(graph)}.json"
        unchanged = manifest.files.keys() - content.keys() - {facts_file}
        for name in unchanged:
            link_or_copy((staging.target / name).resolve(), folder / name)
        (folder / FOLDER).mkdir(exist_ok=True)
        for name, data in content.items():
            (folder / name).write_bytes(data)
        if not flavour.ahead_of_time:
            facts = _timed(facts, folder / f"{_engine_name(graph)}.engine", manifest, options.gpu)
        (folder / facts_file).write_bytes(facts.to_bytes())
        sealed = rewrite_manifest(folder, manifest, {name: manifest.files[name] for name in unchanged})
    step = "" if facts.step_ms is None else f", {facts.step_ms:.2f} ms a step"
    report(f"  {len(built.engine) / 1e6:.0f} MB in {seconds:.0f} s{step}")
    return sealed


def _engine_facts(
    staging: Staging,
    manifest: Manifest,
    flavour: Flavour,
    graph: str,
    precision: str,
    options: EngineOptions,
    built: BuiltEngine,
    seconds: float,
) -> EngineManifest:
    """Return what the bundle records of an engine: by what, from what, and for what it was built."""
    return EngineManifest(
        flavour=flavour.name,
        version=flavour.version,
        targets=options.targets,
        graph=manifest.files[graph].sha256,
        engine=hashlib.sha256(built.engine).hexdigest(),
        size=len(built.engine),
        precision=precision,
        batch=built.size.batch,
        nodes=built.size.nodes,
        rows=built.size.rows,
        draft=built.size.draft,
        least=options.capacity.least,
        best=options.capacity.best,
        most=options.capacity.most,
        seconds=seconds,
        weights=tuple((name, manifest.files[name].sha256) for name in external_files(staging.target, graph)),
    )


def _chosen_graphs(bundle: Bundle, key: str, steps: Sequence[str]) -> list[str]:
    """Return the graph files of `key` for some steps, or for all. Raises BundleError for a step without a graph."""
    found = {step_name(name, key): name for name in bundle.manifest.files if step_name(name, key)}
    if unknown := set(steps) - found.keys():
        raise BundleError(
            f"no graph for step {min(unknown)!r} in {bundle.root}; there are {', '.join(found) or 'none'}"
        )
    if not found:
        raise BundleError(f"{bundle.root} has no graphs for {key}; build it with --backend {key.rsplit('-', 1)[0]}")
    return [name for step, name in found.items() if not steps or step in steps]


def _check_operators(bundle: Bundle, flavour: Flavour) -> None:
    """Raise BundleError if graphs have fused operators that the flavour does not support."""
    fused = bundle.manifest.sources.get("fused")
    if isinstance(fused, list) and flavour.name in fused and not flavour.fuses:
        raise BundleError(
            f"the graphs of {bundle.root} have fused operators, which {flavour.name} {flavour.version} does not "
            "support (TensorRT does from 10.15 on); build the bundle again with medusa-export build on this machine"
        )


def _timed(facts: EngineManifest, engine: Path, manifest: Manifest, gpu: int = 0) -> EngineManifest:
    """Add the time of a step to the facts; an engine that cannot run here raises, and is not added to the bundle."""
    from medusa_runtime.backends.cuda import CudaDevice

    return replace(facts, step_ms=round(step_ms(facts, engine, manifest.model, manifest.heads, CudaDevice(gpu)), 4))


def _is_up_to_date(bundle: Bundle, graph: str, flavour: Flavour, options: EngineOptions) -> bool:
    """Return whether the bundle has the engine that would be built from a graph and the graph's weights."""
    files, name = bundle.manifest.files, _engine_name(graph)
    if not {f"{name}.json", f"{name}.engine"} <= files.keys():
        return False
    try:
        facts = EngineManifest.from_file(bundle.root / f"{name}.json")
    except BundleError:
        return False
    if facts.changed(graph, files) or facts.engine != files[f"{name}.engine"].sha256:
        return False
    if {weights for weights, _ in facts.weights} != set(external_files(bundle.root, graph)):
        return False
    found = (facts.flavour, facts.version, facts.targets, Capacity(facts.least, facts.best, facts.most))
    return found == (flavour.name, flavour.version, options.targets, options.capacity)


def find_targets(flavour: Flavour, targets: Sequence[str], gpu: int = 0) -> tuple[str, ...]:
    """Return the compute capabilities to build for.

    Args:
        flavour: The installed TensorRT flavour.
        targets: The targets that the user has named.
        gpu: Number of the GPU to build for, if the flavour does not build ahead of time.

    Raises:
        BundleError: For targets that the flavour does not know or cannot build for, and if there is no target.
    """
    if flavour.ahead_of_time:
        flavour.check_targets(targets)
        return tuple(targets)
    if targets:
        raise BundleError(f"{flavour.name} {flavour.version} builds for the GPU of this machine; omit --target")
    from medusa_runtime.backends.cuda import CudaDevice

    return ("sm{}{}".format(*CudaDevice(gpu).compute_capability),)
