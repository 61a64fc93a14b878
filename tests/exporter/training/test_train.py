import json

import numpy as np
import pytest
import torch
from medusa_exporter.distillation.dataset import DataError, DataFacts, from_rows
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.heads.storage import load_heads
from medusa_exporter.training import hidden_states, model_digest, report, train, training_loop
from medusa_exporter.training.accuracy import measure_hits, top_accuracy
from medusa_runtime.errors import UnsupportedModelError

SETTINGS = train.Settings(heads=3, layers=1, epochs=20, batch=256, learning_rate=1e-2, hold_out=0.2)


def small(model, *rows):
    facts = DataFacts("tiny-llama", model_digest.model_digest(model), 256, (1,), 0, {})
    marks = [np.arange(len(prompt) + len(answer)) >= len(prompt) for prompt, answer in rows]
    return from_rows(facts, [(np.array(a + b), answer, 0.0, 1) for (a, b), answer in zip(rows, marks, strict=True)])


def test_positions_are_those_before_an_answer(model):
    data = small(model, ([10, 11], [12, 13, 14]), ([20], [21]), ([30, 31, 32], [33, 34]))
    found = hidden_states.collect_positions(model, data, heads=3)
    ignored = hidden_states.IGNORED
    assert found.row.tolist() == [0, 0, 2]
    assert found.root.tolist() == [12, 13, 33]
    assert found.targets.tolist() == [[13, 14, ignored], [14, ignored, ignored], [34, ignored, ignored]]
    for tokens, place, line in (([10, 11, 12, 13, 14], [1, 2], [0, 1]), ([30, 31, 32, 33, 34], [2], [2])):
        alone = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0, place]
        torch.testing.assert_close(found.hidden[line], alone, atol=1e-5, rtol=1e-5)


def test_positions_do_not_depend_on_how_rows_are_batched(model, counting_data, monkeypatch):
    together = hidden_states.collect_positions(model, counting_data, 2)
    monkeypatch.setitem(hidden_states.TOKENS_PER_PASS, "cpu", 100)
    apart = hidden_states.collect_positions(model, counting_data, 2)
    torch.testing.assert_close(together.hidden, apart.hidden, atol=1e-5, rtol=1e-5)
    assert torch.equal(together.targets, apart.targets)


def test_rows_without_targets_are_refused(model):
    with pytest.raises(DataError, match="no answer"):
        hidden_states.collect_positions(model, small(model, ([1, 2], [3])), 2)


def test_heads_learn_what_can_be_learnt(model, counting_data, tmp_path):
    lines = []
    heads = train.train(
        model, counting_data, SETTINGS, tmp_path, name="tiny-llama", command="train", report=lines.append
    )
    facts = json.loads((tmp_path / "training.json").read_text())
    assert min(facts["held_back_accuracy"]["top1"]) > 0.9
    assert facts["held_back_rows"] == int(counting_data.held_out(0.2).sum())
    held = hidden_states.collect_positions(model, counting_data.select(counting_data.held_out(0.2)), 3)
    assert max(top_accuracy(measure_hits(MedusaHeads(64, 3, 1, "root"), model, held), 1)) < 0.3
    back = load_heads(tmp_path, 64, 256)
    torch.testing.assert_close(back.weights[0], heads.weights[0], atol=1e-3, rtol=1e-2)
    assert json.loads((tmp_path / "config.json").read_text())["base_model_name_or_path"] == "tiny-llama"
    found = report.evaluate_heads(model, back, counting_data, name="tiny-llama", source="test", hold_out=0.2)
    assert found.greedy
    assert found.rows < facts["held_back_rows"]
    assert found.accuracy["top1"][0] > 0.9
    assert found.lines[0].nodes == 2
    assert 1.8 < found.lines[0].checked <= 2
    assert "tokens/step" in report.format_report(found)
    report.write_profiles(found.trees, tmp_path / "trees")
    assert (tmp_path / "trees/tree-2.toml").read_text().startswith('name = "tree-2"')


def test_held_out_rows_are_never_trained_on(model, counting_data, tmp_path, monkeypatch):
    seen = []
    real = train.collect_positions

    def recorded(model, data, heads, **more):
        seen.append((more.get("label"), set(data.groups.tolist())))
        return real(model, data, heads, **more)

    monkeypatch.setattr(train, "collect_positions", recorded)
    settings = train.Settings(heads=1, layers=1, epochs=0.01, hold_out=0.3)
    train.train(model, counting_data, settings, tmp_path, name="m", command="", report=lambda _: None)
    (_, trained), (label, held) = seen
    assert label == "held out"
    assert held
    assert not trained & held
    assert held == set(counting_data.groups[counting_data.held_out(0.3)].tolist())


def test_minutes_bound_the_run(model, counting_data, tmp_path):
    lines = []
    settings = train.Settings(heads=1, layers=1, minutes=0.02, batch=64)
    train.train(model, counting_data, settings, tmp_path, name="m", command="", report=lines.append)
    facts = json.loads((tmp_path / "training.json").read_text())
    assert facts["steps"] >= training_loop.PROBE_STEPS
    assert sum(facts["seconds"].values()) < 6
    assert any("positions/s" in line for line in lines)


def test_data_of_another_model_is_refused(other_model, counting_data, tmp_path):
    with pytest.raises(DataError, match="distilled from tiny-llama"):
        train.train(other_model, counting_data, SETTINGS, tmp_path, name="other", command="", report=print)
    with pytest.raises(DataError, match="distilled from tiny-llama"):
        report.evaluate_heads(other_model, MedusaHeads(64, 1, 1), counting_data, name="other", source="")


def test_a_hold_out_that_leaves_nothing_is_refused(model, counting_data, tmp_path):
    settings = train.Settings(hold_out=1.0)
    with pytest.raises(DataError, match="held out"):
        train.train(model, counting_data, settings, tmp_path, name="m", command="", report=print)
    with pytest.raises(DataError, match="--all"):
        report.choose_rows(counting_data, 0.0)
    with pytest.raises(DataError, match=r"conversations was held out from training \(--hold-out 0.0\); expected"):
        report.choose_rows(counting_data, 0.0)  # nothing about prompts, which were not named


def test_devices_and_dtypes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hidden_states.pick_device("auto") == "cpu"
    assert hidden_states.pick_dtype("auto", "cpu") is torch.float32
    assert hidden_states.pick_dtype("auto", "cuda:0") is torch.bfloat16
    with pytest.raises(UnsupportedModelError, match="no GPU"):
        hidden_states.pick_device("cuda")


def test_half_precision_trains_too(model, counting_data, tmp_path):
    import copy

    half = copy.deepcopy(model).to(torch.bfloat16)
    train.train(half, counting_data, SETTINGS, tmp_path, name="m", command="", report=lambda _: None)
    facts = json.loads((tmp_path / "training.json").read_text())
    assert min(facts["held_back_accuracy"]["top1"]) > 0.9


def test_trees_need_two_halves_and_enough_samples():
    hits, answers = np.zeros((6, 2), np.int16), np.arange(6)
    assert report.evaluate_trees(hits, answers, np.ones(6, bool)) == ()
    (line,) = report.evaluate_trees(hits, answers, np.arange(6) % 2 == 0)
    assert (line.nodes, line.depth, line.checked) == (2, 1, 1.0)  # answers of one position leave nothing to draft
    (line,) = report.evaluate_trees(np.zeros((12, 2), np.int16), np.arange(12) // 3, np.arange(12) // 3 % 2 == 0)
    assert (line.nodes, line.checked) == (2, 1.5)  # three tokens, in steps of two and one
    assert list(report.fit_trees(hits, answers, "")) == [2]


def test_rows_opened_by_certain_prompts(counting_data):
    prompts = [("1", "later"), ("40",), ("no such",)]
    rows, greedy = report.choose_rows(counting_data, None, prompts)
    assert (rows.rows, greedy) == (2, True) or rows.groups.tolist()
    assert set(rows.groups.tolist()) <= {report.group_of("1"), report.group_of("40")}
    with pytest.raises(DataError, match="begins with one of the 1 prompts"):
        report.choose_rows(counting_data, None, [("no such",)])


def test_what_a_smaller_draft_vocabulary_loses(model, counting_data, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "VOCABULARIES", (16, 32, 512))
    monkeypatch.setattr(report, "VOCABULARY_SIZES", (2,))
    heads = train.train(model, counting_data, SETTINGS, tmp_path, name="m", command="", report=lambda _: None)
    found = report.evaluate_heads(model, heads, counting_data, name="m", source="", hold_out=0.2)
    half, whole = found.vocabularies
    assert (half.tokens, whole.tokens) == (16, 32)
    assert whole.lost[2] == pytest.approx(0, abs=0.02)  # the rows hold 32 tokens
    assert 0.3 < half.lost[2] < 0.8
    assert "would lose" in report.format_report(found)
