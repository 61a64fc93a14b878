"""A build holds its weights once: the peak of its memory, measured as benchmarks/build_memory.py does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from medusa_exporter.heads.architecture import stored_architecture
from medusa_exporter.heads.headers import find_heads
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.heads.storage import save_heads
from medusa_exporter.models import ModelSource, read_sizes
from medusa_exporter.preflight import memory_needed

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "build_memory.py"
HIDDEN, VOCABULARY = 1024, 16_384
MOST = {"fp32": 1.3, "int4": 1.7}  # times the weights in fp32


@pytest.fixture(scope="module")
def model_of_some_size(tmp_path_factory, tokenizer):
    """A random Llama with 84 million weights in bf16, as most are published, and heads for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("some-size")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_heads(MedusaHeads(HIDDEN, 4, 1, token_map=torch.arange(1024)), folder / "heads", {"vocab_size": VOCABULARY})
    return folder


@pytest.mark.slow
def test_the_peak_is_bound_by_the_weights(model_of_some_size, tmp_path):
    folder, found = model_of_some_size, tmp_path / "found.json"
    command = [sys.executable, BENCHMARK, folder / "model", "--heads", folder / "heads", "--json", found]
    subprocess.run([*command, "--precision", ",".join(MOST)], check=True)
    measured = json.loads(found.read_text())
    sizes = read_sizes(ModelSource.resolve(str(folder / "model")))
    expected = memory_needed(sizes, stored_architecture(find_heads(folder / "heads")))
    for precision, build in measured["builds"].items():
        peak = max(build["anonymous"].values()) - build["ready_anonymous"]
        assert peak <= MOST[precision] * measured["weights"], precision
        assert peak <= expected, precision  # so that what passes the check before a build fits
        left = build["at_start"]["built"] - build["ready_anonymous"]
        assert left < 0.5 * measured["weights"], precision
