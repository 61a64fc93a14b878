"""Builds the engines of a bundle, those that are missing or stale, and puts each in its place as it is done."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medusa_runtime.bundle import Bundle, seal
from medusa_runtime.engine_facts import EngineFacts
from medusa_runtime.errors import BundleError
from medusa_runtime.facts import FileFacts
from medusa_runtime.manifest import Manifest

from medusa_exporter.engines import flavours
from medusa_exporter.engines.builder import build_engine
from medusa_exporter.engines.flavours import Flavour
from medusa_exporter.engines.plan import Capacity, capacity, step_name
from medusa_exporter.engines.timing import step_ms
from medusa_exporter.files import write_bytes

Report = Callable[[str], None]
FOLDER = "engines"


@dataclass(frozen=True)
class Wanted:
    """How engines are to be built. targets: compute capabilities. gpu: the number of the one that builds."""

    capacity: Capacity
    targets: tuple[str, ...] = ()
    gpu: int = 0


def make_engines(
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
    bundle = Bundle.open(folder, engines=True, expected_digest=expected_digest)
    facts, _ = bundle.graph(backend, precision)
    _check_operators(bundle, flavour)
    length = min(max_length or bundle.model.context, bundle.model.context)
    wanted = Wanted(capacity(length, static_capacity), find_targets(flavour, targets, gpu), gpu)
    found = {step_name(name, facts.key): name for name in bundle.manifest.files if step_name(name, facts.key)}
    if unknown := set(steps) - found.keys():
        raise BundleError(f"no graph for step {min(unknown)!r} in {folder}; there are {', '.join(found) or 'none'}")
    graphs = [name for step, name in found.items() if not steps or step in steps]
    if not graphs:
        raise BundleError(f"{folder} has no graphs for {facts.key}; build it with --backend {backend}")
    built, manifest = [], bundle.manifest
    for number, name in enumerate(graphs, start=1):
        stem = f"{FOLDER}/{Path(name).stem}"
        if not force and _stands(bundle, stem, flavour, manifest.files[name].sha256, wanted):
            report(f"engine {number} of {len(graphs)}: {stem} is up to date")
            continue
        report(
            f"engine {number} of {len(graphs)}: build {stem} for {', '.join(wanted.targets)} (minutes for many layers)"
        )
        manifest = _make(bundle.root, manifest, flavour, name, facts.precision, wanted, report)
        built.append(stem)
    return built


def _check_operators(bundle: Bundle, flavour: Flavour) -> None:
    """Raise BundleError for graphs of fused operators where the flavour takes none."""
    fused = bundle.manifest.sources.get("fused")
    if isinstance(fused, list) and flavour.name in fused and not flavour.fuses:
        raise BundleError(
            f"the graphs of {bundle.root} have fused operators, which {flavour.name} {flavour.version} does not take "
            "(TensorRT does from 10.15 on); make the bundle again with medusa-export build on this machine"
        )


def _make(
    root: Path, manifest: Manifest, flavour: Flavour, graph: str, precision: str, wanted: Wanted, report: Report
) -> Manifest:
    """Build the engine of one graph and list it; return the manifest that stands then."""
    started, stem = time.monotonic(), f"{FOLDER}/{Path(graph).stem}"
    (root / FOLDER).mkdir(exist_ok=True)
    cache = root / FOLDER / f"{flavour.name}-{flavour.version}.cache"
    data, size = build_engine(
        flavour,
        root / graph,
        precision,
        wanted.capacity,
        wanted.targets if flavour.ahead_of_time else (),
        timing_cache=cache,
        report=report,
    )
    facts = EngineFacts(
        flavour=flavour.name,
        version=flavour.version,
        targets=wanted.targets,
        graph=manifest.files[graph].sha256,
        engine=hashlib.sha256(data).hexdigest(),
        size=len(data),
        precision=precision,
        batch=size.batch,
        nodes=size.nodes,
        rows=size.rows,
        draft=size.draft,
        least=wanted.capacity.least,
        best=wanted.capacity.best,
        most=wanted.capacity.most,
        seconds=round(time.monotonic() - started, 1),
    )
    engine = root / f"{stem}.engine"
    write_bytes(engine, data)
    if not flavour.ahead_of_time:
        facts = _timed(facts, engine, manifest, wanted.gpu)
    write_bytes(engine.with_suffix(".json"), facts.to_bytes())
    new = {f"{stem}.engine", f"{stem}.json", cache.relative_to(root).as_posix()}
    sealed = reseal(root, manifest, {name: one for name, one in manifest.files.items() if name not in new})
    step = "" if facts.step_ms is None else f", {facts.step_ms:.2f} ms a step"
    report(f"  {len(data) / 1e6:.0f} MB in {facts.seconds:.0f} s{step}")
    return sealed


def _timed(facts: EngineFacts, engine: Path, manifest: Manifest, gpu: int = 0) -> EngineFacts:
    """Add what a step takes. An engine that cannot be run here does not stay."""
    from medusa_runtime.backends.cuda import CudaDevice

    try:
        return replace(facts, step_ms=round(step_ms(facts, engine, manifest.model, manifest.heads, CudaDevice(gpu)), 4))
    except BaseException:
        engine.unlink(missing_ok=True)
        raise


def reseal(root: Path, manifest: Manifest, known: Mapping[str, FileFacts] | None = None) -> Manifest:
    """List the files of a bundle anew, after engines have come to it. known: those that are as they were."""
    return seal(
        root,
        producer=manifest.producer,
        model=manifest.model,
        heads=manifest.heads,
        graphs=manifest.graphs,
        profiles=manifest.profiles,
        sources=manifest.sources,
        known=known,
    )


def _stands(bundle: Bundle, stem: str, flavour: Flavour, graph: str, wanted: Wanted) -> bool:
    """Whether the engine there is the one that would be built."""
    if not {f"{stem}.json", f"{stem}.engine"} <= bundle.manifest.files.keys():
        return False
    try:
        facts = EngineFacts.from_file(bundle.root / f"{stem}.json")
    except BundleError:
        return False
    found = (facts.flavour, facts.version, facts.targets, facts.graph, Capacity(facts.least, facts.best, facts.most))
    return found == (flavour.name, flavour.version, wanted.targets, graph, wanted.capacity)


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


def carry_over(old: Path, new: Path) -> list[str]:
    """Copy from a bundle that is being replaced the engines whose graphs are the same in the new one, not yet sealed.

    Return their names. What cannot be read is left behind: it would be refused when it is used.
    """
    kept = []
    for file in sorted((old / FOLDER).glob("*.json")):
        graph, engine = new / "graphs" / f"{file.stem}.onnx", file.with_suffix(".engine")
        try:
            same = EngineFacts.from_file(file).graph == hashlib.sha256(graph.read_bytes()).hexdigest()
        except (BundleError, OSError):
            continue
        if same and engine.is_file():
            (new / FOLDER).mkdir(exist_ok=True)
            for one in (file, engine, *(old / FOLDER).glob("*.cache")):
                shutil.copy2(one, new / FOLDER)
            kept.append(file.stem)
    return kept
