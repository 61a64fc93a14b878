import json

import numpy as np
import pytest
from medusa_exporter.distillation import dataset
from medusa_exporter.distillation.dataset import DataError


@pytest.fixture
def folder(tmp_path, counting_data):
    dataset.save_data(counting_data, tmp_path / "data")
    return tmp_path / "data"


def test_what_is_saved_comes_back(folder, counting_data):
    back = dataset.load_data(folder)
    assert back.facts == counting_data.facts
    for name in dataset.ARRAYS:
        np.testing.assert_array_equal(getattr(back, name), getattr(counting_data, name))
    assert back.tokens.dtype == np.uint16


def test_rows_select_and_concatenate(counting_data):
    assert counting_data.row(1)[1].tolist() == [False] * 4 + [True] * 36
    chosen = np.arange(counting_data.rows) % 2 == 0
    halves = [counting_data.select(chosen), counting_data.select(~chosen)]
    joined = dataset.concatenate(halves)
    assert joined.rows == counting_data.rows
    np.testing.assert_array_equal(joined.row(1)[0], counting_data.row(2)[0])
    assert counting_data.select(np.zeros(counting_data.rows, bool)).rows == 0


def test_large_vocabularies_take_four_bytes(counting_data):
    facts = dataset.DataFacts("m", "d", 100_000, (1,), 0, {})
    one = dataset.from_rows(facts, [(np.array([70_000, 1, 2]), np.array([False, True, True]), 0.0, 5)])
    assert one.tokens.dtype == np.uint32
    assert one.tokens.tolist() == [70_000, 1, 2]
    assert dataset.from_rows(facts, []).rows == 0


def test_answers_may_lie_in_several_places_and_be_another_s(tmp_path, counting_data):
    marks = [np.array(text) == 1 for text in ([0, 1, 1, 0, 1], [0, 0, 1])]
    made = dataset.from_rows(
        counting_data.facts, [(np.arange(5), marks[0], 0.7, 1), (np.arange(3), marks[1], float("nan"), 2)]
    )
    dataset.save_data(made, tmp_path)
    back = dataset.load_data(tmp_path)
    for row, mark in enumerate(marks):
        np.testing.assert_array_equal(back.row(row)[1], mark)
    assert np.isnan(back.temperature[1])
    assert {path.name for path in tmp_path.iterdir()} == {*(f"{name}.npy" for name in dataset.ARRAYS), "meta.json"}


def test_saving_over_a_data_set_replaces_it(folder, counting_data):
    dataset.save_data(counting_data.select(np.arange(counting_data.rows) < 7), folder)
    assert dataset.load_data(folder).rows == 7


def test_saving_that_fails_leaves_the_data_set_that_lay_there(folder, counting_data, monkeypatch):
    def full(file, array, **how):
        if array.dtype == np.float32:
            raise OSError("no space left")
        save(file, array, **how)

    save, files = np.save, {path.name for path in folder.iterdir()}
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="no space"):
        dataset.save_data(counting_data.select(np.arange(counting_data.rows) < 7), folder)
    assert dataset.load_data(folder).rows == counting_data.rows
    assert {path.name for path in folder.iterdir()} == files


def test_a_conversation_is_held_out_whole(counting_data):
    held = counting_data.held_out(0.3)
    assert 0.1 < held.mean() < 0.5
    assert not counting_data.held_out(0).any()
    assert counting_data.held_out(1).all()
    twice = dataset.concatenate([counting_data, counting_data])
    np.testing.assert_array_equal(twice.held_out(0.3), np.tile(held, 2))


@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in dataset.ARRAYS), "meta.json"])
def test_a_missing_or_damaged_file_is_refused(folder, name):
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError):
        dataset.load_data(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=name if name != "meta.json" else "distill"):
        dataset.load_data(folder)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("tokens", np.full(4800, 256, np.uint16)),
        ("tokens", np.zeros(10, np.uint16)),
        ("tokens", np.zeros(4800)),
        ("offsets", np.arange(3)),
        ("offsets", np.array([0, 4800, 10, 4800])),
        ("answer", np.zeros(3, np.uint8)),
        ("temperature", np.zeros(3, np.float32)),
        ("groups", np.zeros((3, 2), np.uint64)),
    ],
)
def test_files_that_do_not_belong_together_are_refused(folder, name, array):
    np.save(folder / f"{name}.npy", array)
    with pytest.raises(DataError):
        dataset.load_data(folder)


def test_pickles_are_refused(folder):
    np.save(folder / "tokens.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match="tokens"):
        dataset.load_data(folder)


@pytest.mark.parametrize("change", [{"format": "other"}, {"vocab_size": "many"}, {"eos": 3}])
def test_odd_facts_are_refused(folder, change):
    meta = json.loads((folder / "meta.json").read_text()) | change
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError):
        dataset.load_data(folder)


def test_data_of_two_models_is_not_joined(counting_data):
    other = dataset.from_rows(dataset.DataFacts("b", "other", 256, (1,), 0, {}), [])
    with pytest.raises(DataError, match="different models"):
        dataset.concatenate([counting_data, other])
    with pytest.raises(DataError, match="no data set"):
        dataset.concatenate([])
