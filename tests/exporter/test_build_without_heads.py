"""Bundles without heads: the model's own tokens in every precision, drafts from the text, no trees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from medusa_exporter.build import build
from medusa_exporter.precisions import FORMATS
from medusa_profiles import catalogue
from medusa_profiles.profile import ProfileError
from medusa_runtime import Decoder, Engine, SamplingParams
from medusa_runtime.backends import load_backend
from medusa_runtime.backends.base import literal_step
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import ArgumentError, BundleError
from medusa_runtime.facts import PLAIN, HeadFacts

PROMPT = [17, 40, 90, 41, 200, 17, 40, 90, 41, 201, 17, 40]  # some of its tokens repeat
PROMPTS = [PROMPT, [3, 4, 5, 6] * 8, [250]]


def greedy(**options: object) -> SamplingParams:
    return SamplingParams(max_tokens=60, ignore_eos=True, **options)


def test_what_the_bundle_holds(tiny_without_heads: Path) -> None:
    bundle = Bundle.open(tiny_without_heads, weights=True)
    assert bundle.heads == HeadFacts.none()
    assert bundle.profiles() == {}
    assert {graph.profile for graph in bundle.manifest.graphs.values()} == {PLAIN}
    assert bundle.manifest.sources["heads"] is None
    checks = bundle.manifest.graph_checks
    assert checks["graphs/ort-cpu-w8a8.onnx"].steps == ("prefill", "plain", "tree", "rope")  # no draft
    for backend in ("tensorrt", "tensorrt-rtx"):  # the engine of plain decoding has logits of all rows
        graph = onnx.load(bundle.root / f"graphs/{backend}-fp16-plain.onnx", load_external_data=False).graph
        [rows] = [value.type.tensor_type.shape.dim for value in graph.output if value.name == "argmax"]
        assert [size.dim_value for size in rows] == [1, 16]
    assert sorted(file for file in checks if "/tensorrt-fp16" in file) == [
        "graphs/tensorrt-fp16-plain.onnx",
        "graphs/tensorrt-fp16-prefill.onnx",
    ]


def test_no_operator_of_a_draft_is_left(tiny_without_heads: Path) -> None:
    for file in sorted((tiny_without_heads / "graphs").glob("*.onnx")):
        graph = onnx.load(file, load_external_data=False).graph
        read = {name for node in graph.node for name in node.input}
        [made] = [node for node in graph.node if "tokens" in node.output]
        assert (made.op_type, list(made.input)) == ("Identity", ["input_ids"]), file
        assert "draft_hidden" not in read


def test_its_tokens_are_those_of_transformers(tiny_without_heads: Path, tiny_model: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model)
    with Engine.load(tiny_without_heads, precision="fp32") as engine:
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            tokens = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60, min_new_tokens=60
            )
            own = greedy(bad_words=(), min_tokens=60)
            assert engine.generate(prompt, own).token_ids == tuple(tokens[0, len(prompt) :].tolist())


@pytest.mark.parametrize("precision", FORMATS)
def test_every_draft_gives_the_tokens_of_the_bundle_with_heads(
    tiny_without_heads: Path, tiny_precisions: Path, precision: str
) -> None:
    with Engine.load(tiny_precisions, precision=precision, profile=PLAIN) as engine:
        expected = [engine.generate(prompt, greedy()).token_ids for prompt in PROMPTS]
    with Engine.load(tiny_without_heads, precision=precision) as engine:
        assert engine.profile.size == 1
        for draft in (None, "auto", "ngram", "heads"):
            assert [engine.generate(prompt, greedy(draft=draft)).token_ids for prompt in PROMPTS] == expected
        sampled = [
            engine.generate(PROMPT, SamplingParams(max_tokens=40, temperature=0.8, seed=3, draft=draft)).token_ids
            for draft in ("heads", "ngram", "auto")
        ]
        assert sampled[0] == sampled[1] == sampled[2]
        steps = engine.stats().steps_by_draft
    assert any("ngram" in name for name in steps) and "plain" in steps
    assert all(name == "plain" or "ngram" in name for name in steps)


def test_a_tree_is_refused(tiny_without_heads: Path) -> None:
    words = "no heads[:;].*, or build with --heads"
    tree = catalogue.load_profile("tree-4")
    with pytest.raises(BundleError, match=words):
        Engine.load(tiny_without_heads, precision="fp32", profile="tree-4")
    with pytest.raises(ProfileError, match=words):
        Engine.load(tiny_without_heads, precision="fp32", profile=tree)
    with Engine.load(tiny_without_heads, precision="fp32", profile=PLAIN) as engine:
        with pytest.raises(ArgumentError, match=words):
            engine.generate(PROMPT, SamplingParams(profile="tree-4"))
        with pytest.raises(ProfileError, match=words):
            engine.generate(PROMPT, SamplingParams(profile=tree))
        assert engine.generate(PROMPT, SamplingParams(profile=PLAIN, max_tokens=3)).token_ids


def test_a_candidate_is_refused(tiny_without_heads: Path) -> None:
    backend = load_backend(Bundle.open(tiny_without_heads), "ort-cpu", "fp32")
    Decoder(backend)
    with pytest.raises(RuntimeError, match=r"the id -1, a candidate, but there are no heads; expected token ids only"):
        backend.run(literal_step(np.array([-1], np.int32), 0, np.array([0], np.int32)))


def test_a_second_build_does_nothing_and_heads_are_another_build(
    tiny_model: Path, tiny_heads: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    assert build(str(tiny_model), None, bundle).built
    assert not (bundle / "profiles").exists()
    assert not build(str(tiny_model), None, bundle).built
    done = build(str(tiny_model), str(tiny_heads), bundle, profiles=("tree-4",))
    assert done.built and done.manifest.heads.count


def test_what_needs_heads_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    with pytest.raises(
        ProfileError, match=r"profile auto .* without heads there are none; leave it out, or build with"
    ):
        build(str(tiny_model), None, bundle, profiles=("auto",))
    with pytest.raises(ProfileError, match=r"'tree-4' .* there are no heads; leave the tree out, or build with"):
        build(str(tiny_model), None, bundle, profiles=("tree-4",))
    with pytest.raises(BundleError, match=r"revision 'v1' of heads, but no heads; give both .* or neither"):
        build(str(tiny_model), None, bundle, heads_revision="v1")
    assert not bundle.exists()


@pytest.mark.parametrize("precision", ["int8", "w8a8", "int4"])
def test_the_embedding_has_8_bits(tiny_without_heads: Path, precision: str) -> None:
    graph = onnx.load(tiny_without_heads / f"graphs/ort-cpu-{precision}.onnx", load_external_data=False).graph
    [lookup] = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    readers = [node.op_type for node in graph.node if lookup.input[0] in node.input]
    assert readers == ["GatherBlockQuantized", *(["MatMulNBits"] if precision != "w8a8" else [])]  # the lm_head's table
    assert (300, 64) not in {tuple(tensor.dims) for tensor in graph.initializer}  # in floats
