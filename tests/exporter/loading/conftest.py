"""Folders of the tiny model, each with something changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file


class Folder:
    """A copy of a model's folder that a test may change."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def config(self, file: str = "config.json", **changes: Any) -> None:
        """Set keys of a JSON file; None removes one."""
        path = self.path / file
        content = (json.loads(path.read_text()) if path.exists() else {}) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def weights(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Write the weights anew, changed."""
        path = self.path / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, path, {"format": "pt"})

    def shard(self) -> None:
        """Put the embedding into one shard and all else into another, with an index."""
        tensors = load_file(self.path / "model.safetensors")
        (self.path / "model.safetensors").unlink()
        first = {"model.embed_tokens.weight": tensors.pop("model.embed_tokens.weight")}
        shards = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": tensors}
        for name, held in shards.items():
            save_file(held, self.path / name, {"format": "pt"})
        places = {tensor: name for name, held in shards.items() for tensor in held}
        (self.path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Folder:
    """A copy of the tiny model, whose embedding is its lm_head too."""
    return Folder(Path(shutil.copytree(tiny_model, tmp_path / "model")))


@pytest.fixture
def untied(folder: Folder) -> Folder:
    """The same with an lm_head of its own."""
    folder.weights(lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2})
    folder.config(tie_word_embeddings=False)
    return folder
