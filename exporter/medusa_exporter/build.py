"""Makes a bundle: model + heads -> graph -> a folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_profiles import catalogue
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.toml import to_toml
from medusa_runtime.backends.ort_library import import_onnxruntime
from medusa_runtime.bundle import write_manifest
from medusa_runtime.facts import GraphFacts, HeadFacts, ModelFacts
from medusa_runtime.manifest import Manifest

from medusa_exporter import models
from medusa_exporter.build_inputs import describe_inputs, producer_versions, unchanged_manifest
from medusa_exporter.engines.flavours import FLAVOURS, fusing
from medusa_exporter.engines.reuse import reuse_engines
from medusa_exporter.engines.step_sizes import StepSize, graph_file, graph_files, step_sizes
from medusa_exporter.extras import import_extra
from medusa_exporter.generation_start import generation_start_ids
from medusa_exporter.heads.architecture import read_architecture
from medusa_exporter.loading.end_tokens import end_token_ids
from medusa_exporter.loading.rope import fix_longrope
from medusa_exporter.loading.templates import ChatTemplates, choose_template, try_template
from medusa_exporter.loading.vocabulary import describe_ids_beyond, needed_vocab_size
from medusa_exporter.models import ModelSource
from medusa_exporter.precisions import FIXED_SCALES, choose, default_profile
from medusa_exporter.preflight import check_build
from medusa_exporter.publish import check_target, lock_bundle, replace_bundle
from medusa_exporter.staging import Staging
from medusa_exporter.tokenizer_files import special_tokens, write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_TOP_K = 10  # candidates kept per head, or more where a profile's ranks ask for it
BACKENDS = ("ort-cpu",)  # what is built where none is named
SHARED_DATA = "shared.data"  # what several graphs have in common
Report = Callable[[str], None]


@dataclass(frozen=True)
class BuildResult:
    """What a build came to: `built` is False where nothing had changed."""

    bundle: Path
    manifest: Manifest
    built: bool


def build(
    model: str,
    heads: str,
    bundle: Path,
    *,
    backends: tuple[str, ...] = BACKENDS,
    precisions: tuple[str, ...] = (),
    profiles: tuple[str, ...] = (),
    batch: int = 1,
    chat_template: str | None = None,
    context: int | None = None,
    force: bool = False,
    report: Report = lambda _line: None,
) -> BuildResult:
    """Build `bundle` from a decoder and its heads, or find it as it should be.

    model: hub name, folder or GGUF file. heads: folder or hub name. precisions: one graph for each that a backend runs;
    none means each backend's usual one.
    profiles: names of shipped trees or .toml files; empty means every shipped tree that the heads reach, and of
    TensorRT's graphs for trees the one of the size that suits a GPU. batch: sequences that each of TensorRT's steps
    takes; other graphs are not fixed to any number. chat_template: the name of one of the model's templates or a Jinja
    file; None for the model's default. context: tokens that a prompt and its answer may come to, at most what the model
    supports; None for its `max_position_embeddings`. `report` gets a line as each stage begins. Raises MedusaError or
    ProfileError before any work for what cannot be built; an interrupted build leaves the old bundle, or none.
    """
    check_target(bundle)
    pairs = choose(backends, precisions)
    source = ModelSource.resolve(model)
    count = read_architecture(heads).heads
    trees = choose_profiles(profiles, count)
    steps = step_sizes(trees if profiles else _usual_on_gpu(trees), batch)
    fused = fusing(backend for backend, _ in pairs)
    sources = describe_inputs(source, heads, graph_files(pairs, steps), trees, fused, chat_template, context)
    if not force and Staging(bundle.resolve()).at_rest and (manifest := unchanged_manifest(bundle, sources)):
        return BuildResult(bundle, manifest, built=False)
    choose(backends, precisions, models.read_decoder(source))
    tokens = models.choose_context(source, context)
    check_build(source, heads, report)
    import_extra("onnxscript", "export")
    import_onnxruntime("export")
    with lock_bundle(bundle, report) as staging:
        if not force and (manifest := unchanged_manifest(bundle, sources)):  # built while this one waited
            return BuildResult(bundle, manifest, built=False)
        with replace_bundle(staging) as folder:
            if context is None and (longest := models.longest_context(source)) > tokens:
                report(f"the bundle is for {tokens:,} tokens; --context {longest} makes one for all that YaRN reaches")
            report(f"load model {source.gguf or source.location}")
            manifest = _fill(
                folder, source, heads, pairs, steps, trees, fused, sources, report, bundle, chat_template, tokens
            )
    return BuildResult(bundle, manifest, built=True)


def choose_profiles(names: tuple[str, ...], heads: int) -> tuple[TreeProfile, ...]:
    """Return the named trees, or every shipped one that `heads` heads reach; raise ProfileError for one they don't."""
    if not names:
        return tuple(tree for tree in map(catalogue.load_profile, catalogue.profile_names()) if tree.depth <= heads)
    trees = [
        catalogue.load_profile_file(name) if name.endswith(".toml") else catalogue.load_profile(name) for name in names
    ]
    for tree in trees:
        tree.check_fits(heads, tree.max_rank + 1)
    if repeated := {tree.name for tree in trees if [other.name for other in trees].count(tree.name) > 1}:
        raise ProfileError(f"profile {min(repeated)!r} is asked for twice; give each once")
    return tuple(trees)


def _fill(
    folder: Path,
    source: ModelSource,
    heads: str,
    pairs: list[tuple[str, str]],
    steps: list[StepSize],
    trees: tuple[TreeProfile, ...],
    fused: tuple[str, ...],
    sources: dict[str, Any],
    report: Report,
    replaced: Path,
    chat_template: str | None,
    context: int,
) -> Manifest:
    """Write every file of the bundle into `folder`, the manifest last; `replaced` is the bundle before, if any."""
    import torch

    from medusa_exporter.graph import variants
    from medusa_exporter.graph.calibration import generate_texts
    from medusa_exporter.graph.memory import release_memory
    from medusa_exporter.graph.rotary_tables import rotary_tables, spare_positions
    from medusa_exporter.graph.save import save_graphs
    from medusa_exporter.graph.trace import trace
    from medusa_exporter.heads.storage import load_heads
    from medusa_exporter.validation import GroundTruth, record_reference, unvalidated_window, validate_graphs

    tokenizer = models.load_tokenizer(source)
    templates = choose_template(tokenizer, chat_template)
    sizes = models.read_sizes(source)
    medusa = load_heads(heads, sizes.hidden_size, sizes.vocab_size, needed_vocab_size(tokenizer))
    model = models.load_model(source, torch.float32)
    facts = model_facts(model, source, end_token_ids(model, tokenizer), context)
    for remark in _remarks(tokenizer, templates, facts):
        report(remark)
    top_k = min(medusa.draft_vocabulary or facts.vocab_size, max([LEAST_TOP_K, *(tree.max_rank + 1 for tree in trees)]))
    graphs = [_graph_facts(backend, precision, steps, trees) for backend, precision in pairs]
    (folder / "graphs").mkdir(parents=True)

    reference = record_reference(model, medusa, facts, tokenizer)  # of the model as loaded: nothing here has changed it
    if window := unvalidated_window(model.config, facts.context):
        report(
            f"window of {window:,} tokens: the check of graphs does not reach beyond it, what it hides is not compared"
        )
    fix_longrope(model)
    texts: list[list[int]] = []
    if not FIXED_SCALES.isdisjoint(precision for _, precision in pairs):
        report("let the model write some text, to see how large its activations get")
        texts = generate_texts(model, generation_start_ids(tokenizer, facts.eos_token_ids), facts.context)
    report(f"trace {facts.layers} layers and {medusa.heads} heads (the longest stage: about two minutes for 30 layers)")
    traced = trace(model, medusa, facts, top_k)
    tables = rotary_tables(model, facts.context + spare_positions(backend for backend, _ in pairs))
    windowed = models.hiding_window(model, facts.context) is not None
    source_of = variants.TracedGraph(traced, facts, medusa.input_size, medusa.heads, tables, windowed, texts, folder)
    made, fixed = variants.make_graphs(source_of, pairs, steps, fused)
    report(f"write {', '.join(one.key for one in graphs)}")
    save_graphs({folder / file: graph for file, graph in made.items()}, SHARED_DATA)
    head_facts = HeadFacts(
        medusa.heads, medusa.layers, medusa.conditioning, top_k, medusa.taps, medusa.trunk, medusa.draft_vocabulary
    )
    files = list(made)
    del traced, source_of, made, medusa, model
    release_memory()
    checks = validate_graphs(folder, files, graphs, fixed, GroundTruth(reference, facts, head_facts), report)

    report("write tokenizer and profiles, hash every file")
    write_tokenizer(folder, tokenizer, templates)
    (folder / "profiles").mkdir()
    for tree in trees:
        (folder / "profiles" / f"{tree.name}.toml").write_text(to_toml(tree), encoding="utf-8")
    kept, known = reuse_engines(replaced, folder)
    if kept:
        report(f"keep {len(kept)} engines, whose graphs and weights have not changed")
    return write_manifest(
        folder,
        producer=producer_versions(),
        model=facts,
        heads=head_facts,
        graphs={one.key: one for one in graphs},
        profiles=[tree.name for tree in trees],
        sources=sources,
        graph_checks=checks,
        known=known,
    )


def _remarks(tokenizer: Any, templates: ChatTemplates, facts: ModelFacts) -> Iterator[str]:
    """Say what a user should know of the model before its bundle is made."""
    if not facts.eos_token_ids:
        yield "warning: the model names no end token: answers end at their largest number of tokens"
    if templates.chosen is None:
        yield "the model has no chat template: prompts are plain text (--chat-template FILE gives it one)"
    elif refusal := try_template(templates.chosen, special_tokens(tokenizer)):
        yield f"warning: a lone question cannot be asked of this model: {refusal}"
    if beyond := describe_ids_beyond(tokenizer, facts.vocab_size):
        yield f"the tokenizer has tokens that the model lacks, prompts with them are refused: {beyond}"


def _usual_on_gpu(trees: tuple[TreeProfile, ...]) -> list[TreeProfile]:
    """The tree that a GPU takes where none is named: smaller ones run in its engine too, padded."""
    name = default_profile("tensorrt", "fp16", trees)
    return [tree for tree in trees if tree.name == name]


def _graph_facts(backend: str, precision: str, steps: Sequence[StepSize], trees: tuple[TreeProfile, ...]) -> GraphFacts:
    file = graph_file(backend, precision, steps[0] if backend in FLAVOURS else None)
    return GraphFacts(backend, precision, file, default_profile(backend, precision, trees))


def model_facts(
    model: PreTrainedModel, source: ModelSource, eos_token_ids: tuple[int, ...], context: int
) -> ModelFacts:
    """Read the decoder's shape off its config. eos_token_ids: see `end_token_ids`. context: tokens of the bundle."""
    config = model.config
    heads = config.num_attention_heads
    return ModelFacts(
        name=source.name,
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        attention_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        context=context,
        eos_token_ids=eos_token_ids,
    )
