"""Builds the engines of a bundle, those that are missing or stale, and puts each in its place as it is done.

An engine comes into a bundle as a new bundle does: everything is written next to it, sealed, and swapped in one step.
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
from medusa_exporter.engines.builder import build_engine
from medusa_exporter.engines.flavours import Flavour
from medusa_exporter.engines.reuse import external_files
from medusa_exporter.engines.step_sizes import Capacity, capacity, step_name
from medusa_exporter.engines.timing import step_ms
from medusa_exporter.publish import link_or_copy, lock_bundle, replace_bundle
from medusa_exporter.staging import Staging

Report = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """How engines are to be built. targets: compute capabilities. gpu: the number of the one that builds."""

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
    """Build what a bundle lacks of a backend's engines, one for each of its graphs; return the names of those built.

    steps: names of the steps to build for ("plain", "prefill", "t64"), none for all that there are graphs for.
    max_length: tokens that the keys and values of a sequence may come to, None for the model's context.
    static_capacity: build for one length of the past alone. gpu: the number of the one that TensorRT builds on.
    expected_digest: of the manifest, None for any. Raises BundleError, MissingExtraError.
    """
    flavour = flavours.find(backend)
    if not folder.is_dir():
        raise BundleError(f"no such bundle: {folder} is not a folder; make one with medusa-export build")
    with lock_bundle(folder, report) as staging:
        bundle = Bundle.open(folder, engines=True, expected_digest=expected_digest)
        facts, _ = bundle.graph(backend, precision)
        _check_operators(bundle, flavour)
        length = min(max_length or bundle.model.context, bundle.model.context)
        wanted = Wanted(capacity(length, static_capacity), find_targets(flavour, targets, gpu), gpu)
        built, manifest = [], bundle.manifest
        graphs = _chosen(bundle, facts.key, steps)
        for number, name in enumerate(graphs, start=1):
            stem, what = f"{FOLDER}/{Path(name).stem}", f"engine {number} of {len(graphs)}"
            if not force and _stands(bundle, stem, flavour, name, wanted):
                report(f"{what}: {stem} is up to date")
                continue
            report(f"{what}: build {stem} for {', '.join(wanted.targets)} (minutes for many layers)")
            manifest = _make(staging, manifest, flavour, name, facts.precision, wanted, report)
            built.append(stem)
    return built


def _chosen(bundle: Bundle, key: str, steps: Sequence[str]) -> list[str]:
    """Return the graphs of `key` for these steps, or for all. Raises BundleError for a step without a graph."""
    found = {step_name(name, key): name for name in bundle.manifest.files if step_name(name, key)}
    if unknown := set(steps) - found.keys():
        raise BundleError(
            f"no graph for step {min(unknown)!r} in {bundle.root}; there are {', '.join(found) or 'none'}"
        )
    if not found:
        raise BundleError(f"{bundle.root} has no graphs for {key}; build it with --backend {key.rsplit('-', 1)[0]}")
    return [name for step, name in found.items() if not steps or step in steps]


def _check_operators(bundle: Bundle, flavour: Flavour) -> None:
    """Raise BundleError for graphs of fused operators where the flavour takes none."""
    fused = bundle.manifest.sources.get("fused")
    if isinstance(fused, list) and flavour.name in fused and not flavour.fuses:
        raise BundleError(
            f"the graphs of {bundle.root} have fused operators, which {flavour.name} {flavour.version} does not take "
            "(TensorRT does from 10.15 on); make the bundle again with medusa-export build on this machine"
        )


def _make(
    staging: Staging, manifest: Manifest, flavour: Flavour, graph: str, precision: str, wanted: Wanted, report: Report
) -> Manifest:
    """Build the engine of one graph and list it; return the manifest that stands then."""
    started, stem = time.monotonic(), f"{FOLDER}/{Path(graph).stem}"
    cache = f"{FOLDER}/{flavour.name}-{flavour.version}.cache"
    built = build_engine(
        flavour,
        staging.target / graph,
        precision,
        wanted.capacity,
        wanted.targets if flavour.ahead_of_time else (),
        timing_cache=(staging.target / cache).read_bytes() if cache in manifest.files else b"",
        report=report,
    )
    facts = EngineManifest(
        flavour=flavour.name,
        version=flavour.version,
        targets=wanted.targets,
        graph=manifest.files[graph].sha256,
        engine=hashlib.sha256(built.engine).hexdigest(),
        size=len(built.engine),
        precision=precision,
        batch=built.size.batch,
        nodes=built.size.nodes,
        rows=built.size.rows,
        draft=built.size.draft,
        least=wanted.capacity.least,
        best=wanted.capacity.best,
        most=wanted.capacity.most,
        seconds=round(time.monotonic() - started, 1),
        weights=tuple((name, manifest.files[name].sha256) for name in external_files(staging.target, graph)),
    )
    content = {f"{stem}.engine": built.engine}
    if built.timing_cache is not None:
        content[cache] = built.timing_cache
    with replace_bundle(staging) as folder:
        known = manifest.files.keys() - content.keys() - {f"{stem}.json"}
        for name in known:
            link_or_copy((staging.target / name).resolve(), folder / name)
        (folder / FOLDER).mkdir(exist_ok=True)
        for name, data in content.items():
            (folder / name).write_bytes(data)
        if not flavour.ahead_of_time:
            facts = _timed(facts, folder / f"{stem}.engine", manifest, wanted.gpu)
        (folder / f"{stem}.json").write_bytes(facts.to_bytes())
        sealed = rewrite_manifest(folder, manifest, {name: manifest.files[name] for name in known})
    step = "" if facts.step_ms is None else f", {facts.step_ms:.2f} ms a step"
    report(f"  {len(built.engine) / 1e6:.0f} MB in {facts.seconds:.0f} s{step}")
    return sealed


def _timed(facts: EngineManifest, engine: Path, manifest: Manifest, gpu: int = 0) -> EngineManifest:
    """Add what a step takes; an engine that cannot be run here does not come into the bundle."""
    from medusa_runtime.backends.cuda import CudaDevice

    return replace(facts, step_ms=round(step_ms(facts, engine, manifest.model, manifest.heads, CudaDevice(gpu)), 4))


def _stands(bundle: Bundle, stem: str, flavour: Flavour, graph: str, wanted: Wanted) -> bool:
    """Whether the engine there is the one that would be built from the graph and the weights that it refers to."""
    files = bundle.manifest.files
    if not {f"{stem}.json", f"{stem}.engine"} <= files.keys():
        return False
    try:
        facts = EngineManifest.from_file(bundle.root / f"{stem}.json")
    except BundleError:
        return False
    if facts.changed(graph, files) or facts.engine != files[f"{stem}.engine"].sha256:
        return False
    if {name for name, _ in facts.weights} != set(external_files(bundle.root, graph)):
        return False
    found = (facts.flavour, facts.version, facts.targets, Capacity(facts.least, facts.best, facts.most))
    return found == (flavour.name, flavour.version, wanted.targets, wanted.capacity)


def find_targets(flavour: Flavour, targets: Sequence[str], gpu: int = 0) -> tuple[str, ...]:
    """Return the compute capabilities to build for: those named, or that of GPU number `gpu`, which then builds.

    Raises BundleError for targets that the flavour does not know or cannot build for, and where none can be found.
    """
    if flavour.ahead_of_time:
        flavour.check_targets(targets)
        return tuple(targets)
    if targets:
        raise BundleError(f"{flavour.name} {flavour.version} builds for the GPU that is here; leave --target out")
    from medusa_runtime.backends.cuda import CudaDevice

    return ("sm{}{}".format(*CudaDevice(gpu).compute_capability),)
