"""Heads are held against a model by their headers, before a weight of either is read."""

import subprocess
import sys

import pytest
import torch
from medusa_exporter.heads import base_model, storage
from medusa_exporter.heads.compatibility import check_heads
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.modules import MedusaHeads

from .published import H, V, linears, lm_heads, named, write

LAYERS = 4


@pytest.fixture
def folder(tmp_path):
    heads = MedusaHeads(H, 2, 1, taps=(3, 1), trunk=6, token_map=torch.tensor([9, 2, 4]))
    storage.save_heads(heads, tmp_path / "heads", {base_model.BASE_KEY: "owner/Base-1B", "vocab_size": V})
    return tmp_path / "heads"


def test_heads_that_fit_are_what_they_say(folder):
    facts = check_heads(folder, H, V, LAYERS)
    assert (facts.heads, facts.taps, facts.trunk, facts.draft_vocabulary) == (2, 2, 6, 3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((H + 1, V, LAYERS), r"hidden size 8, but the model's is 9"),
        ((H, 9, LAYERS), r"token_map holds ids from 2 to 9, but the model's tokens are numbered from 0 to 8"),
        ((H, 2, LAYERS), r"draft vocabulary of 3 tokens, but the model's has 2"),
        ((H, V, 3), r"no decoder layer 3 to tap, the model's are 0 to 2"),
    ],
)
def test_what_the_header_says_is_checked(folder, sizes, message):
    with pytest.raises(HeadsError, match=message):
        check_heads(folder, *sizes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("taps", torch.tensor([1, 1]), r"taps holds \[1, 1\]; expected distinct layers"),
        ("taps", torch.tensor([1, -1]), r"taps holds \[1, -1\]; expected distinct layers"),
        ("token_map", torch.tensor([4, 4, 2]), "token_map repeats 1 of its ids"),
        ("token_map", torch.tensor([4, -4, 2]), "ids from -4 to 4"),
        ("token_map", torch.tensor([4.0, 3.0, 2.0]), "token_map is stored as F32; expected I64"),
        ("0.0.linear.weight", torch.zeros(H, H, dtype=torch.int64), "is stored as I64; expected F16 or BF16 or F32"),
    ],
)
def test_damaged_numbers_are_refused(folder, name, value, message):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "medusa_lm_head.safetensors")
    save_file(weights | {name: value}, folder / "medusa_lm_head.safetensors")
    with pytest.raises(HeadsError, match=message):
        check_heads(folder, H, V, LAYERS)


def test_an_lm_head_of_another_vocabulary_is_refused(tmp_path):
    weights = named("{head}.{layer}", linears(1)) | {f"{k}.1.weight": w for k, w in enumerate(lm_heads(63))}
    folder = write(tmp_path, weights)
    check_heads(folder, H, 64, LAYERS, tokens=63)
    with pytest.raises(HeadsError, match="lm_head of 63 tokens, but the model's tokenizer has 64"):
        check_heads(folder, H, 64, LAYERS, tokens=64)
    with pytest.raises(HeadsError, match="lm_head of 63 tokens, but the model's vocabulary has 65"):
        check_heads(folder, H, 65, LAYERS)


def test_weights_are_not_read_before_they_are_loaded(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "medusa_lm_head.safetensors")
    weights["0.0.linear.weight"] = torch.full((H, H), float("nan")).half()
    save_file(weights, folder / "medusa_lm_head.safetensors")
    check_heads(folder, H, V, LAYERS)
    with pytest.raises(HeadsError, match=r"0\.0\.linear\.weight holds NaN or infinite values"):
        storage.load_heads(folder, H, V)


def test_torch_is_not_needed(folder):
    line = (
        "import sys; from medusa_exporter.heads.compatibility import check_heads; "
        f"check_heads({str(folder)!r}, {H}, {V}, {LAYERS}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", line], check=True)


@pytest.mark.parametrize(
    ("named", "model"),
    [
        ("owner/Base-1B", "Base-1B"),
        ("owner/Base-1B", "other/base-1b"),
        ("Base-1B", "/models/Base-1B/"),
        ("./Base-1B", "base-1b"),
        ("owner/Base-1B", "Base-1B.Q4_K_M"),
        ("owner/Base-1B", "base-1b-q8_0.gguf"),
        ("owner/Base-1B", "Base-1B.IQ3_XXS"),
        ("owner/Base-1B", "Base-1B-bf16"),
        ("owner/Base-1B-GGUF", "Base-1B"),
        ("owner/Base-1B", "/cache/models--owner--Base-1B/snapshots/0a1b2c"),
        ("owner/Base--1B", "/cache/models--owner--Base--1B/snapshots/0a1b2c"),
    ],
)
def test_one_base_may_have_several_names(named, model):
    assert base_model.short_name(named) == base_model.short_name(model)


@pytest.mark.parametrize("model", ["Base-3B", "Base-1B-Instruct", "model", "q4", "Base"])
def test_another_base_is_warned_of(folder, model):
    said = base_model.base_model_mismatch(folder, [model])
    assert f"base_model_name_or_path is 'owner/Base-1B', but the model is '{model}'; heads of another" in str(said)
    assert base_model.base_model_mismatch(folder, [model, "Owner/base-1b"]) is None


@pytest.mark.parametrize(
    "config", ["{}", '{"base_model_name_or_path": null}', '{"base_model_name_or_path": " "}', None]
)
def test_heads_that_name_no_base_are_not_warned_of(folder, config):
    (folder / "config.json").unlink()
    if config:
        (folder / "config.json").write_text(config)
    assert base_model.base_model_mismatch(folder, ["Base-3B"]) is None


def test_a_folder_has_the_name_that_it_was_saved_under(tmp_path):
    (tmp_path / "config.json").write_text('{"_name_or_path": "owner/Base-1B"}')
    assert base_model.model_names(tmp_path) == [str(tmp_path.resolve()), "owner/Base-1B"]
    (tmp_path / "config.json").write_text("{}")
    assert base_model.model_names(tmp_path) == [str(tmp_path.resolve())]
