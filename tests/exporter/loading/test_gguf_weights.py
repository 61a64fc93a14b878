"""Decoders of GGUF files against llama.cpp's own logits, and refusals of tensors that nobody takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from medusa_exporter.models import ModelSource, check_family, load_model
from medusa_runtime.errors import UnsupportedModelError

from .gguf_models import CASES, INNER, ROWS, TEXT, made, write

TOLERANCE = 1e-4  # of logits between -16 and 16; llama.cpp multiplies its angles up step by step
EXPECTED = np.load(Path(__file__).with_name("gguf_logits.npz"))


def loaded(path: Path) -> torch.nn.Module:
    return load_model(ModelSource.resolve(str(path)), torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    model = loaded(write(CASES[name], tmp_path / "tiny.gguf"))
    with torch.no_grad():
        logits = model(torch.tensor([TEXT])).logits[0, list(ROWS)].numpy()
    np.testing.assert_allclose(logits, EXPECTED[name], atol=TOLERANCE)


def test_every_case_was_recorded() -> None:
    assert set(EXPECTED.files) == set(CASES)


def test_a_type_of_16_bits(tmp_path: Path) -> None:
    path = write(CASES["llama-factors"], tmp_path / "tiny.gguf")
    model = load_model(ModelSource.resolve(str(path)), torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.base_model.rotary_emb.inv_freq.dtype == torch.float32


def test_no_quantised_form_is_left(tmp_path: Path) -> None:
    model = loaded(write(CASES["llama"], tmp_path / "tiny.gguf"))
    assert not hasattr(model.config, "quantization_config")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


SQUARE = np.zeros((4, 4), np.float32)
FAULTS = {
    "qwen3's norms in llama": ("llama", {"blk.0.attn_q_norm.weight": SQUARE[0]}, r"blk\.0\.attn_q_norm\.weight"),
    "an output's bias": ("qwen2", {"output.bias": np.zeros(98, np.float32)}, r"output\.bias"),
    "an attention output's bias": ("qwen2", {"blk.1.attn_output.bias": SQUARE[0]}, r"blk\.1\.attn_output\.bias"),
    "experts": ("llama", {"blk.0.ffn_gate_exps.weight": SQUARE}, r"blk\.0\.ffn_gate_exps\.weight"),
    "a layer more": ("llama", {"blk.2.attn_norm.weight": np.ones(64, np.float32)}, r"blk\.2\.attn_norm\.weight"),
    "factors that qwen2 has not": ("qwen2", {"rope_freqs.weight": np.ones(8, np.float32)}, r"rope_freqs\.weight"),
    "joined products": ("llama", {"blk.0.attn_qkv.weight": SQUARE}, r"blk\.0\.attn_qkv\.weight"),
    "scales of weights": ("llama", {"blk.0.attn_q.scale": SQUARE[0]}, r"blk\.0\.attn_q\.scale"),
    "no MLP": ("llama", {"blk.1.ffn_up.weight": None}, r"without blk\.1\.ffn_up\.weight.*missing"),
    "a bias in one layer of two": ("llama", {"blk.1.attn_k.bias": np.ones(32, np.float32)}, r"without blk\.0\.attn_k"),
    "another shape": ("llama", {"blk.0.ffn_up.weight": SQUARE}, rf"\(4, 4\), expected \({INNER}, 64\)"),
    "factors of another number": ("llama", {"rope_freqs.weight": np.ones(4, np.float32)}, r"\(4,\).*expected \(8,\)"),
    "a factor of 0": ("llama", {"rope_freqs.weight": np.zeros(8, np.float32)}, "positive factors"),
    "integers": ("llama", {"blk.0.attn_norm.weight": np.ones(64, np.int8)}, "stored as I8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_is_not_used_or_not_there_is_named(fault: str, tmp_path: Path) -> None:
    case, tensors, message = FAULTS[fault]
    path = write(CASES[case], tmp_path / "tiny.gguf", tensors)
    with pytest.raises(UnsupportedModelError, match=message):
        loaded(path)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    path = write(CASES["llama"], tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for size in (5, 30, 1000, len(whole) - 4000):
        path.write_bytes(whole[:size])
        with pytest.raises(UnsupportedModelError, match="not a readable GGUF file"):
            check_family(ModelSource.resolve(str(path)))


def test_the_same_numbers_each_time() -> None:
    first, second = made(CASES["qwen3"]), made(CASES["qwen3"])
    assert all((first[name] == second[name]).all() for name in first)
