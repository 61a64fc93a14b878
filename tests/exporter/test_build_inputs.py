"""What a build was made from: every file of a model that may shape it, every package, and the code itself."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from medusa_exporter import build_inputs, package_versions
from medusa_exporter.models import ModelSource

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "additional_chat_templates/tool_use.jinja",
)


def described(folder: Path) -> object:
    return build_inputs.describe_inputs(ModelSource.resolve(str(folder)), "owner/heads", [], [])["model"]


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_every_file_that_a_tokenizer_is_read_from_is_a_source(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    without = described(tmp_path)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("one")
    first = described(tmp_path)
    assert first != without
    file.write_text("another")
    assert described(tmp_path) != first


def test_what_is_only_read_by_people_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    without = described(tmp_path)
    for name in ("README.md", ".gitattributes", "picture.png", "modeling_own.py"):
        (tmp_path / name).write_text("x")
    assert described(tmp_path) == without


@pytest.mark.parametrize(
    "package",
    ["medusa-export", "torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "onnx-ir"],
)
def test_another_version_of_what_makes_a_bundle_is_another_source(
    monkeypatch: pytest.MonkeyPatch, package: str, tmp_path: Path
) -> None:
    before = build_inputs.producer_versions()
    version = package_versions.metadata.version
    monkeypatch.setattr(package_versions.metadata, "version", lambda name: "99" if name == package else version(name))
    assert build_inputs.producer_versions() == before | {package: "99"}


def test_another_state_of_the_code_is_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shaping_package"
    for place in (package, package / "graph", package / "cli", package / "compare"):
        place.mkdir()
        (place / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(build_inputs, "CODE_PACKAGES", ("shaping_package",))
    seen = [build_inputs.code_digest()]
    (package / "graph" / "trace.py").write_text("a = 1\n")
    seen.append(build_inputs.code_digest())
    (package / "graph" / "trace.py").write_text("a = 2\n")
    seen.append(build_inputs.code_digest())
    (package / "graph" / "trace.py").rename(package / "graph" / "traced.py")
    seen.append(build_inputs.code_digest())
    (package / "compare" / "tolerances.py").write_text("a = 1\n")  # the limits of a build's validation
    seen.append(build_inputs.code_digest())
    assert len(set(seen)) == len(seen)
    (package / "cli" / "bench.py").write_text("a = 1\n")  # bears on no bundle
    assert build_inputs.code_digest() == seen[-1]
    assert "shaping_package" not in sys.modules
    shutil.rmtree(package)


def test_the_code_of_this_package_is_a_source() -> None:
    found = build_inputs.describe_inputs(ModelSource("owner/name", local=False), "owner/heads", [], [])
    assert found["code"] == build_inputs.code_digest() != build_inputs.hashlib.sha256().hexdigest()
