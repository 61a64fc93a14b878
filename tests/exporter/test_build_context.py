"""A bundle built from a GGUF file for fewer tokens than the model supports: its context, its tables, its logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from medusa_exporter.build import build
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.heads.storage import save_heads
from medusa_runtime import contract
from medusa_runtime.backends import load_backend
from medusa_runtime.backends.base import literal_step
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import CapacityError

from .loading.gguf_models import CASES, HIDDEN, ROWS, TEXT, TOKENS, with_keys, write

WANTED, SUPPORTED = 160, 256  # fewer than w8a8 measures activations on, where there is room
PRECISIONS = ("fp32", "w8a8")
LOGITS = Path(__file__).parent / "loading" / "gguf_logits.npz"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    heads = MedusaHeads(HIDDEN, 3, 1, "none")
    save_heads(heads, folder / "heads", {"base_model_name_or_path": "tiny", "vocab_size": len(TOKENS)})
    case = with_keys(CASES["llama-factors"], context_length=SUPPORTED)
    return str(write(case, folder / "tiny.gguf")), str(folder / "heads")


@pytest.fixture(scope="module")
def bundle(sources: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("built") / "bundle"
    assert build(*sources, place, precisions=PRECISIONS, profiles=("tree-4",), context=WANTED).built
    return place


def test_the_context_is_recorded_and_the_table_ends_there(bundle: Path) -> None:
    assert Bundle.open(bundle).model.context == WANTED
    graph = ir.load(bundle / "graphs" / "ort-cpu-fp32.onnx").graph
    for name in ("in_place.cos", "in_place.sin"):
        assert list(graph.initializers[name].shape or ()) == [WANTED + contract.SPARE_ROWS + 1, 8]


def test_another_context_is_another_bundle(bundle: Path, sources: tuple[str, str]) -> None:
    same = build(*sources, bundle, precisions=PRECISIONS, profiles=("tree-4",), context=WANTED)
    assert not same.built
    with pytest.raises(CapacityError, match=f"--context {SUPPORTED + 1}: .* supports up to {SUPPORTED} tokens"):
        build(*sources, bundle, precisions=PRECISIONS, profiles=("tree-4",), context=SUPPORTED + 1)


def test_the_graphs_logits_are_those_of_llama_cpp(bundle: Path) -> None:
    backend = load_backend(Bundle.open(bundle), precision="fp32")
    backend.allocate(1, WANTED)
    ids = np.array(TEXT, np.int32)
    backend.run(literal_step(ids, 0, np.array(ROWS, np.int32)))
    logits = np.stack([backend.read_logits(row) for row in range(len(ROWS))])
    np.testing.assert_allclose(logits, np.load(LOGITS)["llama-factors"], atol=1e-4)


def test_a_step_at_the_end_of_the_context(bundle: Path) -> None:
    """Its dummy row is the one that stands behind the context."""
    backend = load_backend(Bundle.open(bundle), precision="w8a8")
    backend.allocate(1, WANTED)
    ids = np.resize(np.array(TEXT, np.int32), WANTED)
    last = np.array([0], np.int32)
    backend.run(literal_step(ids[:-1], 0, last))
    backend.commit(0, list(range(WANTED - 1)), 0)
    backend.run(literal_step(ids[-1:], WANTED - 1, last))
    assert np.isfinite(backend.read_logits(0)).all()
