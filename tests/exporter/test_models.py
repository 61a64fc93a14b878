import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from medusa_exporter import models
from medusa_exporter.loading.foreign_files import parsed_once
from medusa_exporter.models import ModelSource, check_family
from medusa_runtime.errors import UnsupportedModelError

from .loading.gguf_models import CASES, write


@pytest.fixture
def source(tmp_path):
    return ModelSource.resolve(str(write(CASES["llama"], tmp_path / "tiny.gguf")))


def test_a_gguf_is_parsed_once_while_it_is_loaded(source, monkeypatch):
    parsed = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path):
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    with parsed_once(source.gguf):
        assert [check_family(source) for _ in range(3)] == ["llama"] * 3
        models.load_model(source, torch.float32)
    assert len(parsed) == 1
    assert gguf.GGUFReader is Counted
    check_family(source)
    assert len(parsed) == 1
    write(CASES["qwen2"], Path(source.location) / source.gguf)
    assert check_family(source) == "qwen2"
    assert len(parsed) == 2


@pytest.mark.parametrize(("window", "expected"), [(None, False), (512, False), (4096, False), (511, True), (1, True)])
def test_a_window_as_long_as_the_context_hides_nothing(window, expected):
    model = SimpleNamespace(config=SimpleNamespace(sliding_window=window))
    assert models.effective_window(model, 512) == (window if expected else None)
    model.config.use_sliding_window = False
    assert models.effective_window(model, 512) is None
    model.config = SimpleNamespace()  # of a family that knows none
    assert models.effective_window(model, 512) is None


def test_the_advice_to_run_a_models_own_code_does_not_reach_the_user(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('code of the model was run')")
    with pytest.raises(UnsupportedModelError, match="which is never run here") as caught:
        models.load_tokenizer(ModelSource.resolve(str(folder)))
    assert "trust_remote_code" not in str(caught.value)
