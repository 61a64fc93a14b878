"""Graphs of one tiny model with a window, each as a file that a test may change, and what the model itself computes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from medusa_exporter.engines.step_sizes import StepSize, step_sizes
from medusa_exporter.graph import variants
from medusa_exporter.graph.check import check_saved_graph
from medusa_exporter.graph.rotary_tables import rotary_tables
from medusa_exporter.graph.save import save_graphs
from medusa_exporter.graph.trace import trace
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.validation import GroundTruth, record_reference
from medusa_exporter.validation.graph_runner import GraphRunner
from medusa_exporter.validation.limits import limits
from medusa_exporter.validation.validate import check_graph, packs_weights
from medusa_profiles import catalogue
from medusa_runtime.facts import GraphFacts, HeadFacts
from medusa_runtime.graph_check import GraphCheck

from ..graph.conftest import CONTEXT, HEADS, TOP_K, facts_of, make_model

PAIRS = [
    *(("ort-cpu", precision) for precision in ("fp32", "int8", "w8a8", "int4")),
    *(("ort-cuda", precision) for precision in ("fp32", "fp16", "bf16")),
    ("tensorrt", "fp32"),
]
TREES = ("tree-4", "tree-8", "tree-16")


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]


@dataclass
class ExportedGraphs:
    """A traced model in every graph variant; `files` are paths of graphs in `folder`."""

    folder: Path
    files: list[str]
    graphs: list[GraphFacts]
    sizes: dict[str, StepSize]
    truth: GroundTruth


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedGraphs:
    folder = tmp_path_factory.mktemp("exported")
    (folder / "graphs").mkdir()
    model = make_model("mistral-window")
    facts = facts_of(model)
    torch.manual_seed(1)
    heads = MedusaHeads(facts.hidden_size, HEADS, 1, "root")
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.2)
    reference = record_reference(model, heads, facts, Letters())
    graph = trace(model, heads, facts, TOP_K)
    steps = step_sizes([catalogue.load_profile(name) for name in TREES], 1)
    texts = [np.random.default_rng(at).integers(2, 250, 60).tolist() for at in range(4)]
    source = variants.TracedGraph(
        graph, facts, heads.input_size, HEADS, rotary_tables(model, CONTEXT + 1024), True, texts, folder
    )
    made, sizes = variants.make_graphs(source, PAIRS, steps)
    files = list(made)
    save_graphs({folder / file: one for file, one in made.items()}, "shared.data")
    graphs = [GraphFacts(backend, precision, f"graphs/{backend}-{precision}.onnx") for backend, precision in PAIRS]
    return ExportedGraphs(
        folder, files, graphs, sizes, GroundTruth(reference, facts, HeadFacts(HEADS, 1, "root", TOP_K))
    )


@dataclass
class Changed:
    """One graph with all its weights inside, to be changed, and its check."""

    model: onnx.ModelProto
    path: Path
    exported: ExportedGraphs
    backend: str
    precision: str

    def check(self) -> GraphCheck:
        onnx.save(self.model, self.path)
        declared = check_saved_graph(self.path, self.exported.truth.model, self.exported.truth.heads)
        runner = GraphRunner(declared, packed=packs_weights(self.backend, self.precision))
        return check_graph(runner, limits(self.backend, self.precision), self.exported.truth)


@pytest.fixture
def changed(exported: ExportedGraphs, tmp_path: Path):
    def of(backend: str, precision: str) -> Changed:
        name = f"{backend}-{precision}.onnx"
        path = Path(shutil.copy(exported.folder / "graphs" / name, tmp_path / name))
        model = onnx.load(path, load_external_data=False)
        onnx.load_external_data_for_model(model, str(exported.folder / "graphs"))
        return Changed(model, path, exported, backend, precision)

    return of
