"""A build that can come to nothing is refused before the model is loaded."""

import pytest
import torch
from medusa_exporter import models, preflight
from medusa_exporter.build import build
from medusa_exporter.heads.architecture import stored_architecture
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.headers import find_heads
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.heads.storage import save_heads
from medusa_exporter.loading import memory
from medusa_runtime.errors import CapacityError

NAME = {"base_model_name_or_path": "tiny-llama", "vocab_size": 256}


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights, or a tokenizer, ends the test."""

    def loaded(*_arguments, **_options):
        pytest.fail("something was loaded")

    monkeypatch.setattr(models, "load_model", loaded)
    monkeypatch.setattr(models, "load_tokenizer", loaded)


def saved(folder, heads, config=NAME):
    save_heads(heads, folder, config)
    return str(folder)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (MedusaHeads(32, 3, 1), "hidden size 32, but the model's is 64"),
        (MedusaHeads(64, 3, 1, taps=(2,)), "no decoder layer 2 to tap, the model's are 0 to 1"),
        (MedusaHeads(64, 3, 1, own_lm_head_size=257), "lm_head of 257 tokens, but the model's vocabulary has 256"),
        (MedusaHeads(64, 3, 1, token_map=torch.tensor([3, 256])), "ids from 3 to 256"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_heads_of_another_model_end_a_build_before_it_loads(model_folder, tmp_path, heads, message):
    with pytest.raises(HeadsError, match=message):
        build(str(model_folder), saved(tmp_path / "heads", heads), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("no_weights")
def test_without_heads_only_the_model_counts(model_folder, tmp_path):
    source = models.ModelSource.resolve(str(model_folder))
    preflight.check_build(source, None, print)
    heads = stored_architecture(find_heads(saved(tmp_path / "heads", MedusaHeads(64, 3, 1))))
    sizes = models.read_sizes(source)
    assert preflight.weight_bytes(sizes, None) == 4 * sizes.parameters < preflight.weight_bytes(sizes, heads)
    assert preflight.memory_needed(sizes, None) < preflight.memory_needed(sizes, heads)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("base", "warned"), [("owner/other", True), ("owner/Tiny-Llama", False)])
def test_heads_that_name_another_base_are_warned_of(model_folder, tmp_path, base, warned):
    heads = saved(tmp_path / "heads", MedusaHeads(64, 3, 1), {"base_model_name_or_path": base})
    lines = []
    preflight.check_build(models.ModelSource.resolve(str(model_folder)), heads, lines.append)
    assert [
        line for line in lines if line.startswith("warning: ") and f"is '{base}', but the model is" in line
    ] == lines
    assert bool(lines) == warned


@pytest.mark.usefixtures("no_weights")
def test_a_model_that_cannot_fit_ends_a_build_before_it_loads(model_folder, tmp_path, monkeypatch):
    folder = saved(tmp_path / "heads", MedusaHeads(64, 3, 1))
    source = models.ModelSource.resolve(str(model_folder))
    needed = preflight.memory_needed(models.read_sizes(source), stored_architecture(find_heads(folder)))
    monkeypatch.setattr(memory, "available_memory", lambda _root: needed)
    preflight.check_build(source, folder, print)
    monkeypatch.setattr(memory, "available_memory", lambda _root: needed - 1)
    figures = rf"building it \(0 MB of fp32 weights\) needs about {needed // 10**6} MB of memory, but .* are left"
    with pytest.raises(CapacityError, match=figures):
        build(str(model_folder), folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_model_that_cannot_fit_is_loaded_for_nothing_else(model_folder, model, monkeypatch):
    source = models.ModelSource.resolve(str(model_folder))
    weights = sum(one.numel() for one in model.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(memory, "available_memory", lambda _root, size=weights * dtype.itemsize: size)
        models.load_model(source, dtype)
        monkeypatch.setattr(memory, "available_memory", lambda _root, size=weights * dtype.itemsize: size - 1)
        with pytest.raises(CapacityError, match=f"loading its weights in {8 * dtype.itemsize} bits needs"):
            models.load_model(source, dtype)
