"""What transformers answers, compared with plain decoding of a bundle."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from medusa_exporter.answer_differences import next_logits
from medusa_exporter.bench.timing import generate_timed
from medusa_exporter.transformers_reference import TransformersReference
from medusa_runtime.errors import MissingExtraError, UnsupportedModelError
from medusa_runtime.loading import LoadedBundle, load_bundle


@pytest.fixture(scope="module")
def loaded(tiny_bundle: Path) -> LoadedBundle:
    return load_bundle(tiny_bundle, profile="plain", threads=1)


def test_transformers_answers_as_the_bundle_does(loaded: LoadedBundle, tiny_model: Path) -> None:
    reference = TransformersReference(str(tiny_model), loaded.bundle.model)
    for text in ("Hello there", "What is a tree?", "word " * 60):
        ids = loaded.prompt_encoder.encode(text)
        assert reference.answer(ids, 60) == list(generate_timed(loaded.decoder, ids, 60).tokens)
    np.testing.assert_allclose(reference.next_logits(ids), next_logits(loaded.decoder)(ids), atol=1e-4)


def test_both_end_with_the_context(loaded: LoadedBundle, tiny_model: Path) -> None:
    ids = [5] * (loaded.bundle.model.context - 4)
    facts = dataclasses.replace(loaded.bundle.model, eos_token_ids=())
    loaded.decoder.start(ids, 60, stop_ids=())
    sequence = loaded.decoder.sequence
    assert sequence is not None
    while sequence.finish_reason is None:
        loaded.decoder.step()
    assert TransformersReference(str(tiny_model), facts).answer(ids, 60) == sequence.answer
    assert len(sequence.answer) == 4


def test_the_model_s_own_sampling_settings_do_not_count(loaded: LoadedBundle, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    settings = json.loads((model / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 1.5, "repetition_penalty": 3.0, "eos_token_id": [5, 6]}
    (model / "generation_config.json").write_text(json.dumps(settings))
    ids = loaded.prompt_encoder.encode("a b c")
    answer = TransformersReference(str(model), loaded.bundle.model).answer(ids, 40)
    assert answer == list(generate_timed(loaded.decoder, ids, 40).tokens)


def test_a_model_of_another_shape_is_refused(loaded: LoadedBundle, tiny_model: Path) -> None:
    facts = dataclasses.replace(loaded.bundle.model, layers=3)
    with pytest.raises(UnsupportedModelError, match=r"layers is 2, the bundle's is 3"):
        TransformersReference(str(tiny_model), facts)


def test_without_transformers_the_extra_is_named(
    loaded: LoadedBundle, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medusa-export\[export\]'"):
        TransformersReference(str(tiny_model), loaded.bundle.model)
