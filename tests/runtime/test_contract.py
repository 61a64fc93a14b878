import pytest
from medusa_runtime import contract

DIMENSIONS = {"B", "T", "P", "R", "S", "N"}


SUMMARIES = [
    ("finite", "bool", (1, "R")),
    ("top_ids", "int32", (1, "S", 50)),
    ("top_logits", "float32", (1, "S", 50)),
    ("logsumexp", "float32", (1, "S")),
]


def specs(layers=3, dtype="float32", **options):
    inputs = contract.input_specs(layers, state_size=16, kv_row=8, dtype=dtype, **options)
    return inputs, contract.output_specs(layers, state_size=16, vocab_size=50, kv_row=8, dtype=dtype, **options)


def test_a_graph_for_a_gpu_summarises_rows_between_the_others():
    plain, summarised = specs(layers=1), specs(layers=1, summaries=True)
    for some, all_, after, added in zip(plain, summarised, ("logit_rows", "logits"), (1, 4), strict=True):
        names = [spec.name for spec in all_]
        begin = names.index(after) + 1
        assert (*all_[:begin], *all_[begin + added :]) == some
    assert summarised[0][6] == contract.TensorSpec("summary_rows", "int32", ("B", "S"))
    assert [(spec.name, spec.dtype, spec.shape) for spec in summarised[1][3:7]] == [
        (name, dtype, ("B", *shape[1:])) for name, dtype, shape in SUMMARIES
    ]
    assert tuple(spec.name for spec in contract.summary_specs(50)) == contract.SUMMARY_OUTPUTS


@pytest.mark.parametrize(("vocabulary", "tokens"), [(1, 1), (63, 63), (64, 64), (65, 64), (151936, 64)])
def test_a_summary_has_at_most_64_tokens(vocabulary, tokens):
    assert contract.summary_tokens(vocabulary) == tokens
    assert contract.summary_specs(vocabulary)[1].shape == ("B", "S", tokens)


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


def test_a_step_in_place_on_a_gpu_has_past_rows_and_summaries():
    cpu, gpu = (contract.in_place_specs(1, 16, 50, 2, 4, "float16", gpu=gpu) for gpu in (False, True))
    names = [[spec.name for spec in specs] for specs in gpu]
    assert names[0][6] == "summary_rows" and names[0][-1] == "past_rows"
    assert tuple(spec for spec in gpu[0] if spec.name not in ("summary_rows", "past_rows")) == cpu[0]
    assert [(spec.name, spec.dtype, spec.shape) for spec in gpu[1][3:7]] == SUMMARIES
    assert (*gpu[1][:3], *gpu[1][7:]) == cpu[1]


def test_a_step_whose_rows_lie_together():
    inputs, outputs = contract.stacked_specs(2, state_size=16, vocab_size=50, kv_row=8, dtype="float16")
    step, results = specs(layers=0, summaries=True)
    assert inputs == (*step, contract.TensorSpec("past", "float16", ("B", "P", 32)))
    assert outputs == (*results, contract.TensorSpec("new", "float16", ("B", "T", 32)))
