"""What is recorded is what transformers computes, whatever cache or batch it comes by."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.loading.rope import fix_longrope
from medusa_exporter.validation.reference import (
    VALIDATION_TREE,
    far_positions,
    record_reference,
    text_ids,
    unvalidated_window,
)
from medusa_runtime.errors import UnsupportedModelError

from ..graph.conftest import CONTEXT, facts_of, make_model
from .conftest import Letters


@pytest.mark.parametrize("family", ["llama-yarn", "mistral-window", "gemma2"])
def test_each_nodes_logits_are_those_of_its_own_text(family: str) -> None:
    model = make_model(family)
    facts = facts_of(model)
    before = model.config._attn_implementation
    reference = record_reference(model, MedusaHeads(facts.hidden_size, 2, 1), facts, Letters())
    assert model.config._attn_implementation == before
    steps = {step.name: step for step in reference.steps}
    prompt, tree = steps["prefill"].ids.tolist(), steps["tree"]
    for node in range(VALIDATION_TREE.size):
        text = [*prompt, *tree.ids[VALIDATION_TREE.mask[node]].tolist()]
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0, -1].numpy()
        np.testing.assert_allclose(tree.expected.logits[node], logits, atol=2e-5)
    assert ("window" in steps) is (family != "llama-yarn")
    assert steps["rope"].positions.tolist()[-1] == CONTEXT - 1
    assert len(steps["rope"].expected.keys) == (2 if "window" not in steps else 1)


def test_without_heads_the_same_steps_are_recorded() -> None:
    model = make_model("llama3-rope")
    facts = facts_of(model)
    heads = MedusaHeads(facts.hidden_size, 2, 1)
    alone, both = (record_reference(model, one, facts, Letters()) for one in (None, heads))
    assert alone.draft is None and both.draft is not None
    for one, other in zip(alone.steps, both.steps, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.expected.logits, other.expected.logits)
        np.testing.assert_array_equal(one.expected.hidden, other.expected.hidden)


def test_a_window_step_lies_beyond_the_window() -> None:
    model = make_model("mistral-window")
    steps = {one.name: one for one in record_reference(model, MedusaHeads(64, 2, 1), facts_of(model), Letters()).steps}
    assert steps["window"].past.length > model.config.sliding_window == 7


def test_positions_around_the_length_of_an_unscaled_rope() -> None:
    scaled = SimpleNamespace(rope_parameters={"original_max_position_embeddings": 64})
    assert far_positions(scaled, 256) == [0, 63, 64, 65, 128, 255]
    assert far_positions(scaled, 64) == [0, 32, 63]  # the context ends there
    assert far_positions(SimpleNamespace(original_max_position_embeddings=32), 100) == [0, 31, 32, 33, 50, 99]
    assert far_positions(SimpleNamespace(rope_parameters=None), 10) == [0, 5, 9]


def test_ids_are_those_of_the_vocabulary() -> None:
    assert len(text_ids(Letters(), 200, 500)) == 500
    assert max(text_ids(Letters(), 70, 500)) < 70
    none = SimpleNamespace(encode=lambda text, add_special_tokens: [900])
    assert text_ids(none, 8, 12) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]


def test_far_tokens_alone_are_compared_by_the_first_layer_in_fewer_bits() -> None:
    model = make_model("llama")
    steps = record_reference(model, MedusaHeads(64, 2, 1), facts_of(model), Letters()).steps
    assert [step.name for step in steps if step.far] == ["rope"]
    first = steps[-1].first_layer().expected
    assert first.keys.shape == first.values.shape == (1, 3, 32) and not first.hidden.size and not first.logits.size


def test_a_longrope_is_recorded_as_loaded_and_is_the_one_that_is_traced() -> None:
    model = make_model("phi3-longrope")
    facts = replace(facts_of(model), context=CONTEXT // 2)  # the length up to which it keeps its short factors
    heads = MedusaHeads(facts.hidden_size, 2, 1)
    before = record_reference(model, heads, facts, Letters())
    fix_longrope(model)
    after = record_reference(model, heads, facts, Letters())
    assert [step.positions.tolist() for step in before.steps if step.far] == [[0, CONTEXT // 4, CONTEXT // 2 - 1]]
    for one, other in zip(before.steps, after.steps, strict=True):
        np.testing.assert_array_equal(one.expected.keys, other.expected.keys)
        np.testing.assert_array_equal(one.expected.logits, other.expected.logits)


@pytest.mark.parametrize(("number", "word"), [(float("nan"), "NaN"), (float("inf"), "NaN|infinity")])
def test_a_model_that_gives_no_numbers_is_refused_by_name_and_layer(number: float, word: str) -> None:
    model = make_model("llama")
    heads = MedusaHeads(64, 2, 1)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = number
    where = rf"^tiny: the model itself computes ({word}) in the values of layer 1 .*; check its weights"
    with pytest.raises(UnsupportedModelError, match=where):
        record_reference(model, heads, facts_of(model), Letters())


def test_heads_that_give_no_numbers_are_refused() -> None:
    model = make_model("llama")
    heads = MedusaHeads(64, 2, 1)
    with torch.no_grad():
        next(heads.parameters()).fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match=r"^tiny: the heads compute NaN in their logits"):
        record_reference(model, heads, facts_of(model), Letters())


def test_a_window_that_no_step_goes_beyond_is_told() -> None:
    for window, context, expected in ((4096, 8192, 4096), (4096, 4096, None), (256, 8192, None), (None, 8192, None)):
        assert unvalidated_window(SimpleNamespace(sliding_window=window), context) == expected
    assert unvalidated_window(SimpleNamespace(sliding_window=4096, use_sliding_window=False), 8192) is None
