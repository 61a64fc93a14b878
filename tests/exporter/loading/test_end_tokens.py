"""End tokens: whatever names one counts, each once, and only ids of the vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from medusa_exporter.build import build
from medusa_exporter.distillation.dataset import load_facts
from medusa_exporter.distillation.distill import DistillationPlan, distill
from medusa_exporter.loading.end_tokens import end_token_ids
from medusa_exporter.models import ModelSource, load_model, load_tokenizer
from medusa_runtime.errors import UnsupportedModelError

from .conftest import Folder
from .gguf_models import CASES, with_keys, write


def named(generation: Any = None, config: Any = None, tokenizer: Any = None, vocabulary: int = 10) -> tuple[int, ...]:
    model: Any = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=generation),
        config=SimpleNamespace(eos_token_id=config),
        get_input_embeddings=lambda: SimpleNamespace(weight=torch.zeros(vocabulary, 1)),
    )
    return end_token_ids(model, SimpleNamespace(eos_token_id=tokenizer))


def test_all_that_name_one_are_united_sorted_each_once() -> None:
    assert named([7, 3, 7], 3, 5) == (3, 5, 7)
    assert named([9], [9, 0], None) == (0, 9)
    assert named() == ()


@pytest.mark.parametrize("wrong", [10, -1, "</s>", True, 2.0, [[1]]])
def test_what_is_no_id_of_the_vocabulary_is_named_with_its_place(wrong: Any) -> None:
    token = wrong[0] if isinstance(wrong, list) else wrong
    for place, words in (
        ("generation", "generation_config.json"),
        ("config", r"config\.json"),
        ("tokenizer", "tokeni"),
    ):
        with pytest.raises(UnsupportedModelError) as error:
            named(**{place: wrong})
        assert f"names {token!r} as an end token, expected token ids of 0 … 9" in str(error.value)
        assert words.replace("\\", "") in str(error.value)


def loaded(folder: Folder) -> tuple[Any, Any]:
    source = ModelSource.resolve(str(folder))
    return load_model(source, torch.float32), load_tokenizer(source)


def test_a_default_of_transformers_ends_nothing(folder: Folder) -> None:
    """LlamaConfig's default end token is 2, which may be any word of the vocabulary."""
    folder.config(eos_token_id=None)
    (folder.path / "generation_config.json").unlink()
    folder.config("tokenizer_config.json", eos_token="<|endoftext|>")
    assert end_token_ids(*loaded(folder)) == (0,)


def test_build_and_distill_agree(folder: Folder, tiny_heads: Path, tmp_path: Path) -> None:
    folder.config(eos_token_id=7)
    folder.config("generation_config.json", eos_token_id=[5, 6, 5])
    built = build(str(folder), str(tiny_heads), tmp_path / "bundle", profiles=("chain-1",))
    assert built.manifest.model.eos_token_ids == (2, 5, 6, 7)
    plan = DistillationPlan((("a",),), max_new_tokens=4, context=64, batch=1, follow_ups=False)
    distill(*loaded(folder), "tiny", plan, tmp_path / "data", minutes=None, report=lambda _line: None)
    assert load_facts(tmp_path / "data").eos == (2, 5, 6, 7)


def test_an_id_beyond_the_vocabulary_ends_the_build(folder: Folder, tiny_heads: Path, tmp_path: Path) -> None:
    folder.config("generation_config.json", eos_token_id=[2, 300])
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json names 300 as an end token"):
        build(str(folder), str(tiny_heads), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_names_the_ends_of_turns_too(tmp_path: Path) -> None:
    ends = {"tokenizer__ggml__eot_token_id": 3, "tokenizer__ggml__eom_token_id": 3}
    path = write(with_keys(CASES["llama"], **ends), tmp_path / "tiny.gguf")
    source = ModelSource.resolve(str(path))
    assert end_token_ids(load_model(source, torch.float32), SimpleNamespace(eos_token_id=None)) == (0, 3)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_generation_config_is_not_taken_for_none(folder: Folder, content: str) -> None:
    (folder.path / "generation_config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json: .*expected a JSON object"):
        load_model(ModelSource.resolve(str(folder)), torch.float32)


def test_tokens_that_the_model_lacks_are_reported(folder: Folder, tiny_heads: Path, tmp_path: Path) -> None:
    path = folder.path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "[PAD]"})
    path.write_text(json.dumps(content))
    lines: list[str] = []
    build(str(folder), str(tiny_heads), tmp_path / "out", profiles=("chain-1",), report=lines.append)
    assert any("tokens that the model lacks" in line and "'[PAD]' (300)" in line for line in lines)
