import pytest
from medusa_runtime import contract

DIMENSIONS = {"B", "T", "P", "R", "N"}


def specs(layers=3, dtype="float32"):
    inputs = contract.input_specs(layers, state_size=16, kv_row=8, dtype=dtype)
    return inputs, contract.output_specs(layers, state_size=16, vocab_size=50, kv_row=8, dtype=dtype)


def test_inputs_of_a_step():
    inputs, _ = specs(layers=2)
    assert [(spec.name, spec.dtype, spec.shape) for spec in inputs] == [
        ("input_ids", "int32", ("B", "T")),
        ("position_ids", "int32", ("B", "T")),
        ("tree_mask", "bool", ("B", "T", "T")),
        ("past_length", "int32", ("B",)),
        ("draft_hidden", "float32", ("N", 16)),
        ("logit_rows", "int32", ("B", "R")),
        ("past_key_0", "float32", ("B", "P", 8)),
        ("past_key_1", "float32", ("B", "P", 8)),
        ("past_value_0", "float32", ("B", "P", 8)),
        ("past_value_1", "float32", ("B", "P", 8)),
    ]


def test_outputs_of_a_step():
    _, outputs = specs(layers=2)
    assert [(spec.name, spec.dtype, spec.shape) for spec in outputs] == [
        ("tokens", "int32", ("B", "T")),
        ("argmax", "int32", ("B", "R")),
        ("logits", "float32", ("B", "R", 50)),
        ("hidden", "float32", ("B", "T", 16)),
        ("new_key_0", "float32", ("B", "T", 8)),
        ("new_key_1", "float32", ("B", "T", 8)),
        ("new_value_0", "float32", ("B", "T", 8)),
        ("new_value_1", "float32", ("B", "T", 8)),
    ]


@pytest.mark.parametrize("layers", [1, 30])
def test_names_are_unique_and_every_past_has_its_new_rows(layers):
    inputs, outputs = specs(layers)
    names = [spec.name for spec in (*inputs, *outputs)]
    assert len(names) == len(set(names)) == 6 + 4 + 4 * layers
    pasts = {spec.name.removeprefix("past_"): spec for spec in inputs if spec.name.startswith("past_k")}
    news = {spec.name.removeprefix("new_"): spec for spec in outputs if spec.name.startswith("new_k")}
    assert pasts.keys() == news.keys()
    for key, past in pasts.items():
        assert (past.dtype, past.shape[2]) == (news[key].dtype, news[key].shape[2])


def test_rows_alone_take_the_precision():
    half = [spec for group in specs(dtype="float16") for spec in group]
    rows = {spec.name for spec in half if "key" in spec.name or "value" in spec.name}
    assert {spec.name for spec in half if spec.dtype == "float16"} == rows
    assert all(isinstance(size, int) or size in DIMENSIONS for spec in half for size in spec.shape)


def test_a_step_in_place():
    inputs, outputs = contract.in_place_specs(layers=2, state_size=16, vocab_size=50, kv_heads=2, head_dim=4)
    assert [(spec.name, spec.dtype, spec.shape) for spec in inputs] == [
        ("input_ids", "int32", (1, "T")),
        ("position_ids", "int32", (1, "T")),
        ("tree_mask", "bool", (1, "T", "T")),
        ("past_length", "int32", (1,)),
        ("draft_hidden", "float32", ("N", 16)),
        ("logit_rows", "int32", (1, "R")),
        *((f"past_{what}_{i}", "float32", (1, 2, "C", 4)) for what in ("key", "value") for i in range(2)),
    ]
    assert [(spec.name, spec.dtype, spec.shape) for spec in outputs] == [
        ("tokens", "int32", (1, "T")),
        ("argmax", "int32", (1, "R")),
        ("logits", "float32", (1, "R", 50)),
        ("hidden", "float32", (1, "T", 16)),
        *((f"present_{what}_{i}", "float32", (1, 2, "C", 4)) for what in ("key", "value") for i in range(2)),
    ]


def test_a_step_whose_rows_lie_together():
    inputs, outputs = contract.stacked_specs(2, state_size=16, vocab_size=50, kv_row=8, dtype="float16")
    step, results = specs(layers=0)
    assert inputs == (*step, contract.TensorSpec("past", "float16", ("B", "P", 32)))
    assert outputs == (*results, contract.TensorSpec("new", "float16", ("B", "T", 32)))
