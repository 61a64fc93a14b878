"""Builds a bundle from a decoder, with or without Medusa heads; its folder appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medusa_profiles import catalogue
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_runtime.backends.ort_library import import_onnxruntime
from medusa_runtime.errors import BundleError
from medusa_runtime.manifest import Manifest

from medusa_exporter import models
from medusa_exporter.build_inputs import describe_inputs, unchanged_manifest
from medusa_exporter.bundle_writer import BuildPlan, write_bundle
from medusa_exporter.calibration.default_trees import choose_default_trees
from medusa_exporter.engines.flavours import fusing_flavours
from medusa_exporter.engines.step_sizes import graph_files, step_sizes
from medusa_exporter.extras import import_extra
from medusa_exporter.heads.architecture import read_architecture
from medusa_exporter.hub import pin_revision
from medusa_exporter.models import ModelSource
from medusa_exporter.precisions import choose_pairs, default_profile
from medusa_exporter.preflight import check_build
from medusa_exporter.publish import check_target, lock_bundle, replace_bundle
from medusa_exporter.staging import Staging

DEFAULT_BACKENDS = ("ort-cpu",)  # built where no backend is named
AUTO = "auto"  # among the names of trees: the default trees are chosen by measuring
Report = Callable[[str], None]


@dataclass(frozen=True)
class BuildResult:
    """The result of a build.

    Attributes:
        bundle: The bundle's folder.
        manifest: The bundle's manifest.
        built: False where the bundle was up to date, so that nothing was done.
    """

    bundle: Path
    manifest: Manifest
    built: bool


def build(
    model: str,
    heads: str | None,
    bundle: Path,
    *,
    backends: tuple[str, ...] = DEFAULT_BACKENDS,
    precisions: tuple[str, ...] = (),
    profiles: tuple[str, ...] = (),
    batch: int = 1,
    chat_template: str | None = None,
    context: int | None = None,
    revision: str | None = None,
    heads_revision: str | None = None,
    force: bool = False,
    report: Report = lambda _line: None,
) -> BuildResult:
    """Build `bundle` from a decoder and its Medusa heads, unless it is up to date.

    A bundle without heads has no trees: it is decoded plainly, or with drafts from the text (`SamplingParams.draft`).

    Args:
        model: Hub name, folder or GGUF file of the decoder.
        heads: Folder or hub name of the heads; None for a bundle without heads.
        bundle: The folder to write. It may contain nothing, or a bundle, which is then replaced as a whole.
        backends: Backends to build graphs for.
        precisions: Precisions to build; each backend gets those that it runs. Empty for each backend's default.
        profiles: Names of shipped tree profiles, or .toml files. Empty for every shipped tree that is not deeper than
            the number of heads; TensorRT then gets a graph for the one tree size that suits a GPU. With "auto" among
            them, the default tree of each graph is chosen by measuring on this machine.
        batch: Number of sequences in each step of a TensorRT engine. Graphs for other backends accept any number.
        chat_template: Name of one of the model's chat templates, or a Jinja file. None for the model's default.
        context: Number of tokens that a prompt and its answer may have together, at most what the model supports. None
            for the model's `max_position_embeddings`.
        revision: Branch, tag or commit of a hub model, None for its main branch.
        heads_revision: The same of heads on the hub.
        force: Build even if the bundle is up to date.
        report: Called with a line as each stage begins.

    Returns:
        The bundle's manifest, and whether anything was built.

    Raises:
        MedusaError: For what cannot be built, before any work if possible. An interrupted build leaves the previous
            bundle as it was.
        ProfileError: For a tree profile that is not valid or needs more heads.
    """
    check_target(bundle)
    pairs = choose_pairs(backends, precisions)
    source = ModelSource.resolve(model, revision)
    if heads is None:
        _check_headless(profiles, heads_revision)
    else:
        heads = pin_revision(heads, heads_revision)
    measured, profiles = AUTO in profiles, tuple(name for name in profiles if name != AUTO)
    trees = choose_profiles(profiles, 0 if heads is None else read_architecture(heads).heads)
    steps = step_sizes(trees if profiles else _usual_on_gpu(trees), batch)
    fused = fusing_flavours(backend for backend, _ in pairs)
    sources = describe_inputs(source, heads, graph_files(pairs, steps), trees, fused, chat_template, context)
    sources |= {"default_profiles": AUTO} if measured else {}
    if not force and Staging(bundle.resolve()).at_rest and (manifest := unchanged_manifest(bundle, sources)):
        return BuildResult(bundle, manifest, built=False)

    choose_pairs(backends, precisions, models.read_decoder_config(source))
    _check_outside_inputs(bundle, source, heads)
    tokens = models.choose_context(source, context)
    check_build(source, heads, report)
    import_extra("onnxscript", "export")
    import_onnxruntime("export")
    plan = BuildPlan(source, heads, pairs, steps, trees, fused, chat_template, tokens, sources)
    with lock_bundle(bundle, report) as staging:
        if not force and (manifest := unchanged_manifest(bundle, sources)):  # built while this one waited
            return BuildResult(bundle, manifest, built=False)
        if context is None and (longest := models.longest_context(source)) > tokens:
            report(f"the bundle supports {tokens:,} tokens; --context {longest} builds one for all that YaRN allows")
        with replace_bundle(staging) as folder:
            manifest = write_bundle(folder, plan, bundle, report)
            if measured:
                manifest = choose_default_trees(folder, report)
    return BuildResult(bundle, manifest, built=True)


def choose_profiles(names: tuple[str, ...], heads: int) -> tuple[TreeProfile, ...]:
    """Return the named trees, or every shipped tree that is not deeper than the number of heads.

    Args:
        names: Names of shipped trees, or .toml files. Empty for all shipped ones.
        heads: How many heads there are.

    Raises:
        ProfileError: For a tree that needs more heads, and a name that is given twice.
    """
    if not names:
        return tuple(tree for tree in map(catalogue.load_profile, catalogue.profile_names()) if tree.depth <= heads)
    trees = [catalogue.profile_from_file(name) or catalogue.load_profile(name) for name in names]
    for tree in trees:
        tree.check_fits(heads, tree.max_rank + 1)
    if repeated := {tree.name for tree in trees if [other.name for other in trees].count(tree.name) > 1}:
        raise ProfileError(f"profile {min(repeated)!r} is asked for twice; give each once")
    return tuple(trees)


def _check_headless(profiles: tuple[str, ...], heads_revision: str | None) -> None:
    """Refuse options that need heads. Raises BundleError and ProfileError."""
    if heads_revision is not None:
        raise BundleError(
            f"got the revision {heads_revision!r:.80} of heads, but no heads; give both (--heads, --heads-revision) or "
            "neither"
        )
    if AUTO in profiles:
        raise ProfileError(
            f"profile {AUTO} chooses among trees, but without heads there are none; leave it out, or build with --heads"
        )


def _check_outside_inputs(bundle: Path, source: ModelSource, heads: str | None) -> None:
    """Refuse a bundle inside of the folder of the model or the heads, which a build only reads. Raises BundleError."""
    if source.local and not source.gguf and bundle.resolve().is_relative_to(source.location):
        raise BundleError(
            f"{bundle} is inside of the model's folder {source.location}, expected a place outside: give another one"
        )
    if heads is None:
        return
    folder = Path(heads).expanduser()
    if folder.is_dir() and bundle.resolve().is_relative_to(folder.resolve()):
        raise BundleError(
            f"{bundle} is inside of the heads' folder {heads}, expected a place outside: give another one"
        )


def _usual_on_gpu(trees: tuple[TreeProfile, ...]) -> list[TreeProfile]:
    """Return the tree that suits a GPU; its TensorRT engine runs smaller trees too, padded."""
    name = default_profile("tensorrt", "fp16", trees)
    return [tree for tree in trees if tree.name == name]
