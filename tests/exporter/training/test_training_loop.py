import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from medusa_exporter.distillation.dataset import DataError, save_data
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.heads.storage import load_heads
from medusa_exporter.training import checkpoint, train, training_loop

SETTINGS = train.Settings(heads=2, layers=1, epochs=3, batch=256, learning_rate=1e-2, hold_out=0.2, trunk=8)


class Broken(Exception):
    pass


def run(model, data, folder, settings=SETTINGS, force=False, break_at=None, lines=None):
    def report(line):
        (lines if lines is not None else []).append(line)
        if break_at and line.startswith(f"step {break_at}/"):
            raise Broken

    return train.train(model, data, settings, folder, name="m", command="", report=report, force=force)


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(training_loop, "STEPS_PER_LINE", 5)
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", 0.0)


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [training_loop.learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == 0.1
    assert max(rates) == rates[19] == 2.0
    assert rates == sorted(rates[:20]) + sorted(rates[20:], reverse=True)
    assert rates[-1] < 1e-4
    assert training_loop.learning_rate(0, 1, 2.0) == 2.0


def test_a_run_that_was_broken_off_goes_on_exactly(model, counting_data, tmp_path, often):
    whole = run(model, counting_data, tmp_path / "whole")
    with pytest.raises(Broken):
        run(model, counting_data, tmp_path / "broken", break_at=20)
    assert (tmp_path / "broken" / checkpoint.FOLDER).is_dir()
    lines = []
    resumed = run(model, counting_data, tmp_path / "broken", lines=lines)
    assert any(line.startswith("resuming at step 19 of ") for line in lines)
    assert SETTINGS.dropout > 0  # its masks are to come back as well
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not (tmp_path / "broken" / checkpoint.FOLDER).exists()


def test_slow_steps_are_reported_and_saved_by_time(model, counting_data, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "SECONDS_PER_LINE", 0.0)
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Broken):
        run(model, counting_data, tmp_path, break_at=3)
    assert checkpoint.exists(tmp_path)  # long before STEPS_PER_LINE


def test_a_checkpoint_of_another_run_is_refused(model, counting_data, tmp_path, often):
    with pytest.raises(DataError, match="no checkpoint"):
        checkpoint.check(tmp_path, {})
    with pytest.raises(Broken):
        run(model, counting_data, tmp_path, break_at=10)
    other = replace(SETTINGS, learning_rate=2e-2)
    with pytest.raises(DataError, match=r"settings.learning_rate was 0.01, is 0.02\); .* --force"):
        run(model, counting_data, tmp_path, other)
    less = counting_data.select(counting_data.groups != counting_data.groups[0])
    with pytest.raises(DataError, match="data was another"):
        run(model, less, tmp_path)
    state = tmp_path / checkpoint.FOLDER / checkpoint.STATE
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"checkpoint is damaged .* --force"):
        run(model, counting_data, tmp_path)
    (tmp_path / checkpoint.FOLDER / checkpoint.META).write_text("{}")
    with pytest.raises(DataError, match=r"checkpoint is damaged .* --force"):
        run(model, counting_data, tmp_path)


def test_finished_heads_are_up_to_date_refused_or_trained_anew(model, counting_data, tmp_path, often):
    settings = replace(SETTINGS, epochs=1)
    first = run(model, counting_data, tmp_path, settings)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    lines = []
    again = run(model, counting_data, tmp_path, replace(settings, compiled=False), lines=lines)
    assert lines == [f"{tmp_path} is up to date; --force trains anew"]
    torch.testing.assert_close(again.weights[0], first.weights[0], atol=1e-3, rtol=1e-2)
    with pytest.raises(DataError, match=r"trained otherwise \(settings.decay was 0.8, is 0.5\); .* --force"):
        run(model, counting_data, tmp_path, replace(settings, decay=0.5))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written
    with pytest.raises(Broken):
        run(model, counting_data, tmp_path, replace(settings, decay=0.5), force=True, break_at=10)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == written
    with pytest.raises(DataError, match="checkpoint belongs to a run with other arguments"):
        run(model, counting_data, tmp_path, settings)
    lines.clear()
    run(model, counting_data, tmp_path, replace(settings, decay=0.5), lines=lines)
    assert any(line.startswith("resuming at step 9 of ") for line in lines)
    assert (tmp_path / "medusa_lm_head.safetensors").read_bytes() != written["medusa_lm_head.safetensors"]


def test_matrices_decay_and_biases_do_not():
    heads = MedusaHeads(8, 2, 1, trunk=4)
    groups = training_loop._groups(heads, 0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert groups[1]["params"] == list(heads.biases)
    assert sum(len(group["params"]) for group in groups) == len(list(heads.parameters()))


def test_the_order_is_that_of_its_epoch_and_worker():
    orders = [training_loop._order(50, 0, *of, torch.device("cpu")).tolist() for of in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert orders[0] == orders[3]
    assert sorted(orders[0]) == list(range(50))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_decoders_distribution_teaches_too(model, counting_data, tmp_path):
    settings = replace(SETTINGS, target="kl", epochs=0.5)
    heads = run(model, counting_data, tmp_path, settings)
    assert all(parameter.abs().max() > 0 for parameter in heads.parameters())


@pytest.mark.slow
def test_two_processes_train_one_set_of_heads(model_folder, counting_data, tmp_path):
    """Each has half of the rows; after the mean of the gradients both hold the same weights, and one writes them."""
    save_data(counting_data, tmp_path / "data")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "medusa_exporter", "train", str(model_folder), "--data", str(tmp_path / "data")]
    command += ["-o", str(tmp_path / "heads"), "--heads", "2", "--layers", "1", "--epochs", "20", "--batch", "256"]
    command += ["--lr", "1e-2", "--hold-out", "0.2", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("positions to train on") == 1
    top1 = next(
        line
        for line in done.stderr.splitlines()
        if line.startswith("accuracy of each head on held-out conversations, top-1:")
    )
    assert min(map(float, top1.split(":")[1].split())) > 0.9
    load_heads(tmp_path / "heads", 64, 256)
