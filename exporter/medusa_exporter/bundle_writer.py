"""Writes the files of a bundle into an empty folder: graphs, tokenizer, tree profiles, and the manifest last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_profiles.profile import TreeProfile
from medusa_profiles.toml import to_toml
from medusa_runtime.bundle import write_manifest
from medusa_runtime.facts import GraphFacts, HeadFacts, ModelFacts, state_size
from medusa_runtime.manifest import Manifest

from medusa_exporter import models
from medusa_exporter.build_inputs import producer_versions
from medusa_exporter.engines.flavours import FLAVOURS
from medusa_exporter.engines.reuse import reuse_engines
from medusa_exporter.engines.step_sizes import StepSize, graph_file
from medusa_exporter.generation_start import generation_start_ids
from medusa_exporter.loading.end_tokens import end_token_ids
from medusa_exporter.loading.rope import fix_longrope
from medusa_exporter.loading.templates import ChatTemplates, choose_template, try_template
from medusa_exporter.loading.vocabulary import describe_ids_beyond, needed_vocab_size
from medusa_exporter.model_facts import model_facts
from medusa_exporter.models import ModelSource
from medusa_exporter.precisions import FIXED_SCALES, default_profile
from medusa_exporter.tokenizer_files import special_tokens, write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from medusa_exporter.heads.modules import MedusaHeads

MIN_TOP_K = 10  # candidates kept per head, or more where the rank of a profile's node asks for it
SHARED_DATA = "shared.data"  # the file of weights that several graphs have in common
Report = Callable[[str], None]


@dataclass(frozen=True)
class BuildPlan:
    """What a build is to write, decided before any weights are loaded.

    Attributes:
        source: The decoder.
        heads: Folder or hub name of the Medusa heads; None for a bundle without heads.
        pairs: (backend, precision) of each graph.
        steps: Step sizes; TensorRT gets one graph for each.
        trees: Tree profiles that the bundle contains.
        fused: TensorRT flavours whose graphs may contain fused operators.
        chat_template: Name or file of the chat template; None for the model's default.
        context: Number of tokens that a prompt and its answer may have together.
        sources: Description of all inputs, recorded in the manifest, see `build_inputs`.
    """

    source: ModelSource
    heads: str | None
    pairs: list[tuple[str, str]]
    steps: list[StepSize]
    trees: tuple[TreeProfile, ...]
    fused: tuple[str, ...]
    chat_template: str | None
    context: int
    sources: dict[str, Any]


@dataclass
class _Loaded:
    """The loaded decoder and heads, with what the manifest records of them."""

    model: PreTrainedModel
    heads: MedusaHeads | None
    model_facts: ModelFacts
    head_facts: HeadFacts


def write_bundle(folder: Path, plan: BuildPlan, replaced: Path, report: Report) -> Manifest:
    """Write every file of a bundle into `folder` and return its manifest.

    Args:
        folder: An empty folder.
        plan: What to write.
        replaced: Folder of the bundle that this one is to replace, if there is one: its engines are reused where their
            graphs and weights have not changed.
        report: Called with a line as each stage begins.
    """
    from medusa_exporter.graph.memory import release_memory
    from medusa_exporter.validation import GroundTruth, record_reference, validate_graphs

    tokenizer = models.load_tokenizer(plan.source)
    templates = choose_template(tokenizer, plan.chat_template)
    for remark in _template_remarks(tokenizer, templates):
        report(remark)
    loaded = _load(plan, tokenizer, report)
    model, heads = loaded.model_facts, loaded.head_facts
    for remark in _model_remarks(loaded.model.config, tokenizer, model):
        report(remark)

    # The reference comes first: exporting changes the model's attention and rotary embedding.
    reference = record_reference(loaded.model, loaded.heads, model, tokenizer)
    files, sizes = _export_graphs(folder, plan, loaded, tokenizer, report)
    del loaded
    release_memory()
    graphs = [_graph_facts(plan, backend, precision) for backend, precision in plan.pairs]
    checks = validate_graphs(folder, files, graphs, sizes, GroundTruth(reference, model, heads), report)

    report("write tokenizer and profiles, hash every file")
    write_tokenizer(folder, tokenizer, templates)
    _write_profiles(folder, plan.trees)
    reused, hashed = reuse_engines(replaced, folder)
    if reused:
        report(f"keep {len(reused)} engines, whose graphs and weights have not changed")
    return write_manifest(
        folder,
        producer=producer_versions(),
        model=model,
        heads=heads,
        graphs={graph.key: graph for graph in graphs},
        profiles=[tree.name for tree in plan.trees],
        sources=plan.sources,
        graph_checks=checks,
        known=hashed,
    )


def _load(plan: BuildPlan, tokenizer: PreTrainedTokenizerBase, report: Report) -> _Loaded:
    """Load the decoder in fp32, and its heads if there are any."""
    import torch

    from medusa_exporter.heads.storage import load_heads

    report(f"load model {plan.source.gguf or plan.source.location}")
    sizes = models.read_sizes(plan.source)
    heads = None
    if plan.heads is not None:
        heads = load_heads(plan.heads, sizes.hidden_size, sizes.vocab_size, needed_vocab_size(tokenizer))
    model = models.load_model(plan.source, torch.float32)
    facts = model_facts(model, plan.source, end_token_ids(model, tokenizer), plan.context)
    if heads is None:
        return _Loaded(model, None, facts, HeadFacts.none())
    top_k = max([MIN_TOP_K, *(tree.max_rank + 1 for tree in plan.trees)])
    top_k = min(heads.draft_vocabulary or facts.vocab_size, top_k)
    head_facts = HeadFacts(
        heads.heads, heads.layers, heads.conditioning, top_k, heads.taps, heads.trunk, heads.draft_vocabulary
    )
    return _Loaded(model, heads, facts, head_facts)


def _export_graphs(
    folder: Path, plan: BuildPlan, loaded: _Loaded, tokenizer: PreTrainedTokenizerBase, report: Report
) -> tuple[list[str], dict[str, StepSize]]:
    """Trace the model once and write all graph variants into `folder`.

    Returns:
        The graph files' paths in the bundle, and the step size of each file whose shapes are fixed.
    """
    from medusa_exporter.graph import variants
    from medusa_exporter.graph.rotary_tables import rotary_tables, spare_positions
    from medusa_exporter.graph.save import save_graphs
    from medusa_exporter.graph.trace import trace

    model, heads, facts = loaded.model, loaded.heads, loaded.model_facts
    (folder / "graphs").mkdir(parents=True)
    fix_longrope(model)
    texts = _calibration_texts(plan, loaded, tokenizer, report)
    count = loaded.head_facts.count
    what = f"{facts.layers} layers and {count} heads" if count else f"{facts.layers} layers"
    report(f"trace {what} (the longest stage: about two minutes for 30 layers)")
    traced = variants.TracedGraph(
        trace(model, heads, facts, loaded.head_facts.top_k),
        facts,
        state_size(facts, loaded.head_facts),
        count,
        rotary_tables(model, facts.context + spare_positions(backend for backend, _ in plan.pairs)),
        windowed=models.effective_window(model, facts.context) is not None,
        texts=texts,
        scratch=folder,
    )
    graphs, sizes = variants.make_graphs(traced, plan.pairs, plan.steps, plan.fused)
    report(f"write {', '.join(f'{backend}-{precision}' for backend, precision in plan.pairs)}")
    save_graphs({folder / file: graph for file, graph in graphs.items()}, SHARED_DATA)
    return list(graphs), sizes


def _calibration_texts(
    plan: BuildPlan, loaded: _Loaded, tokenizer: PreTrainedTokenizerBase, report: Report
) -> list[list[int]]:
    """Let the model generate texts, if a precision needs the ranges of activations; return their token ids."""
    from medusa_exporter.graph.calibration import generate_texts

    if FIXED_SCALES.isdisjoint(precision for _, precision in plan.pairs):
        return []
    report("generate text with the model, to measure the ranges of its activations")
    start = generation_start_ids(tokenizer, loaded.model_facts.eos_token_ids)
    return generate_texts(loaded.model, start, plan.context)


def _write_profiles(folder: Path, trees: tuple[TreeProfile, ...]) -> None:
    if trees:
        (folder / "profiles").mkdir()
    for tree in trees:
        (folder / "profiles" / f"{tree.name}.toml").write_text(to_toml(tree), encoding="utf-8")


def _graph_facts(plan: BuildPlan, backend: str, precision: str) -> GraphFacts:
    """Return what the manifest records of a graph; for TensorRT its file is that of the first step size."""
    file = graph_file(backend, precision, plan.steps[0] if backend in FLAVOURS else None)
    return GraphFacts(backend, precision, file, default_profile(backend, precision, plan.trees))


def _template_remarks(tokenizer: PreTrainedTokenizerBase, templates: ChatTemplates) -> Iterator[str]:
    """Return what a user should know about the model's chat template, before the model is loaded."""
    if templates.chosen is None:
        yield "the model has no chat template: prompts are plain text (--chat-template FILE gives it one)"
    elif refusal := try_template(templates.chosen, special_tokens(tokenizer)):
        yield f"warning: the chat template refuses a single question: {refusal}"


def _model_remarks(config: Any, tokenizer: PreTrainedTokenizerBase, facts: ModelFacts) -> Iterator[str]:
    """Return what a user should know about a loaded model, before the minutes that its export takes."""
    from medusa_exporter.validation import unvalidated_window

    if not facts.eos_token_ids:
        yield "warning: the model names no end token: answers end at their maximum number of tokens"
    if beyond := describe_ids_beyond(tokenizer, facts.vocab_size):
        yield f"the tokenizer has tokens that the model lacks; prompts that contain them are refused: {beyond}"
    if window := unvalidated_window(config, facts.context):
        yield (
            f"the model has a sliding window of {window:,} tokens: graphs are validated on shorter sequences only, so "
            "what the window hides is not compared"
        )
