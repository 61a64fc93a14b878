"""A tiny model, heads that have learned a little of it, and the bundle made of both: real files, seconds to make."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from .sharing import made_once

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT = "the tree of the heads and the steps of the tree: one step, more tokens; user assistant then there are others"
VOCABULARY, CONTEXT, HIDDEN, HEADS = 300, 512, 64, 5


GRAPHS = Path(__file__).parent / "exporter" / "graph"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a file's tests in one of `make test`'s processes, and all that share the traced models of exporter/graph."""
    for item in items if config.pluginmanager.hasplugin("xdist") else ():
        group = GRAPHS if item.path.is_relative_to(GRAPHS) else item.path
        item.add_marker(pytest.mark.xdist_group(str(group)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep calibrations out of the user's cache, and those of one test out of the next one."""
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path_factory.getbasetemp() / "cache" / os.urandom(8).hex()))


@pytest.fixture(autouse=True)
def normal_verbosity() -> None:
    """Undo what -q or -v of an earlier test's command has set for the process."""
    if (console := sys.modules.get("medusa_exporter.console")) is not None:
        console.set_verbosity(console.Verbosity.NORMAL)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random two-layer Llama with a byte-level tokenizer and a chat template; context 512 tokens.

    Its weights are large, so that greedy text varies; its attention says little, so that heads can learn what follows.
    """
    return made_once(tmp_path_factory, "model", _save_model)


def _save_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(6)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.05
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_heads(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of root-conditioned heads for the tiny model, fitted to its own greedy text for a moment.

    They guess well enough that trees keep paths of several lengths, and badly enough that they reject some.
    """
    return made_once(tmp_path_factory, "heads", lambda folder: _save_heads(tiny_model, folder))


def _save_heads(tiny_model: Path, folder: Path) -> None:
    import torch
    from medusa_exporter.heads.modules import MedusaHeads
    from medusa_exporter.heads.storage import save_heads
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model).requires_grad_(False).eval()
    torch.manual_seed(8)
    prompts = torch.randint(3, VOCABULARY, (96, 12))
    tokens = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=48, max_new_tokens=48
    )
    length = tokens.shape[1] - HEADS - 1  # positions whose every target is there
    chosen = torch.randperm(96 * length)[:1500]
    hidden = model.model(tokens).last_hidden_state[:, :length].reshape(-1, HIDDEN)[chosen]
    roots = model.get_input_embeddings()(tokens[:, 1 : 1 + length]).reshape(-1, HIDDEN)[chosen]
    targets = torch.stack([tokens[:, 2 + k : 2 + k + length].reshape(-1)[chosen] for k in range(HEADS)])  # (K, N)
    heads = MedusaHeads(HIDDEN, HEADS, 1, "root")
    optimiser = torch.optim.AdamW(heads.parameters(), lr=3e-2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work is slower on two
    for _ in range(60):
        logits = heads.logits(heads.features(hidden, roots), model.lm_head)  # (K, N, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.set_num_threads(threads)
    save_heads(heads, folder, {"base_model_name_or_path": "tiny", "vocab_size": VOCABULARY})


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_heads: Path) -> Path:
    """A bundle of the tiny model with every shipped tree; tests that change it must copy it first."""
    return _bundle(tmp_path_factory, tiny_model, tiny_heads, "bundle")


@pytest.fixture(scope="session")
def tiny_precisions(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_heads: Path) -> Path:
    """The same with a graph of every precision, and two trees."""
    from medusa_exporter.precisions import FORMATS

    return _bundle(
        tmp_path_factory,
        tiny_model,
        tiny_heads,
        "precisions",
        precisions=tuple(FORMATS),
        profiles=("tree-4", "tree-8"),
    )


@pytest.fixture(scope="session")
def tiny_without_heads(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A bundle of the tiny model without heads, for every backend in every precision that the CPU can validate."""
    return _bundle(
        tmp_path_factory,
        tiny_model,
        None,
        "without-heads",
        backends=("ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx"),
        precisions=("fp32", "int8", "w8a8", "int4", "fp16"),
    )


@pytest.fixture(scope="session")
def tiny_backends(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_heads: Path) -> Path:
    """The same for every backend of ONNX Runtime, in fp32 and 16 bits."""
    return _bundle(
        tmp_path_factory,
        tiny_model,
        tiny_heads,
        "backends",
        backends=("ort-cpu", "ort-cuda"),
        precisions=("fp32", "fp16", "bf16"),
        profiles=("tree-4", "tree-8", "tree-64"),
    )


@pytest.fixture(scope="session")
def tiny_engines(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_heads: Path) -> Path:
    """The same with the graphs that TensorRT reads, in fp32; no engines."""
    return _bundle(
        tmp_path_factory,
        tiny_model,
        tiny_heads,
        "engines",
        backends=("ort-cpu", "tensorrt"),
        precisions=("fp32",),
        profiles=("tree-4", "tree-64"),
    )


def _bundle(
    factory: pytest.TempPathFactory, model: Path, heads: Path | None, name: str, **options: tuple[str, ...]
) -> Path:
    """Build a bundle of that name, once for all test processes."""
    from medusa_exporter.build import build

    return made_once(factory, name, lambda folder: build(str(model), heads and str(heads), folder, **options))


def _tokenizer() -> object:
    """Byte-level BPE with the special tokens first and a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [TEXT] * 2,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert core.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[2], additional_special_tokens=[SPECIAL[1]], chat_template=TEMPLATE
    )
