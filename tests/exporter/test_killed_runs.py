"""`distill` and `train` killed by the system: the same command resumes them and gives what an unbroken run gives."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from medusa_exporter.distillation.dataset import ARRAYS, save_data

OFTEN = "training_loop.STEPS_PER_LINE, training_loop.CHECKPOINT_SECONDS = 5, 0.0"
CODE = (
    "import sys; from medusa_exporter.training import training_loop; "
    + OFTEN
    + "\nfrom medusa_exporter.cli import main; main(sys.argv[1:])"
)


def start(*arguments):
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


def finish(*arguments, code=0):
    process = start(*arguments)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == code, said[-2000:]
    return said


def kill(sign, *arguments):
    """Start a command and kill it as soon as the file `sign` is there."""
    process = start(*arguments)
    until = time.monotonic() + 240
    while not sign.is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, said[-2000:]


@pytest.mark.slow
def test_train(model_folder, counting_data, tmp_path):
    save_data(counting_data, tmp_path / "data")
    command = ["train", model_folder, "--data", tmp_path / "data", "--layers", 1, "--heads", 2, "--batch", 64]
    command += ["--hold-out", 0.2, "--device", "cpu", "--epochs", 60]
    finish(*command, "-o", tmp_path / "whole")
    broken = tmp_path / "broken"
    kill(broken / "checkpoint" / "state.json", *command, "-o", broken)
    refused = finish(*command, "--decay", 0.5, "-o", broken, code=1)
    assert "settings.decay was 0.8, is 0.5" in refused
    assert "--force" in refused
    assert (broken / "checkpoint" / "state.json").is_file()
    assert "resuming at step " in finish(*command, "-o", broken)
    assert "is up to date" in finish(*command, "-o", broken)
    weights = [tmp_path / name / "medusa_lm_head.safetensors" for name in ("whole", "broken")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert sorted(path.name for path in broken.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
def test_distill(model_folder, tmp_path, force):
    (tmp_path / "prompts").write_text("\n".join(json.dumps({"turns": [f"question {number}"]}) for number in range(40)))
    command = ["distill", model_folder, "--prompts", tmp_path / "prompts", "--max-new-tokens", 24, "--device", "cpu"]
    command += ["--context", 160, "--temperature", 0.7, "--batch", 4]
    finish(*command, "-o", tmp_path / "whole")
    broken, again = tmp_path / "broken", []
    if force:  # over finished data of other arguments
        finish(*command, "--seed", 1, "--no-follow-ups", "-o", broken)
        again = ["--force"]
    kill(broken / "partial" / "batch-00002.npz", *command, *again, "-o", broken)
    refused = finish(*command, "--seed", 1, "-o", broken, code=1)
    assert "seed was 0, is 1" in refused
    done = finish(*command, "-o", broken)
    assert "is up to date" not in done
    assert "is up to date" in finish(*command, "-o", broken)
    for name in ARRAYS:
        arrays = [np.load(tmp_path / folder / f"{name}.npy") for folder in ("whole", "broken")]
        np.testing.assert_array_equal(*arrays)
    assert not (broken / "partial").exists()
