"""Text to token ids by a bundle's chat template; the words of each refusal are tested in test_engine.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from medusa_runtime import Engine
from medusa_runtime.bundle import TOKENIZER, Bundle, rewrite_manifest
from medusa_runtime.errors import CapacityError
from medusa_runtime.manifest import Manifest
from medusa_runtime.prompt_encoder import PromptEncoder


def test_it_lays_out_as_the_engine_does(tiny_bundle: Path) -> None:
    encoder, engine = PromptEncoder(Bundle.open(tiny_bundle)), Engine.load(tiny_bundle, profile="plain", threads=1)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well?"}]
    assert encoder.has_chat_template
    for prompt in ("Hello", messages):
        assert encoder.encode(prompt) == engine.encode(prompt)
    assert encoder.encode("Hello", raw=True) == engine.encode("Hello", raw=True) != engine.encode("Hello")


def test_a_prompt_longer_than_the_context_could_hold_is_not_tokenised(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = PromptEncoder(Bundle.open(tiny_bundle))
    limit = 512 * 64  # tokens of the context, characters of each; the tiny vocabulary's tokens are shorter
    assert encoder.max_characters == limit
    assert len(encoder.encode("x" * limit, raw=True)) == limit
    monkeypatch.setattr(encoder.tokenizer, "encode", None)
    message = {"role": "user", "content": "x" * (limit - 4)}
    for prompt, raw, characters in (
        ("x" * (limit + 1), True, limit + 1),
        ("x" * 10**8, False, 10**8),
        ([message, message], False, 2 * limit),
        ([message], False, limit + 46),  # with what the template writes around it
    ):
        with pytest.raises(CapacityError, match=rf"has {characters} characters, expected at most {limit}, more than"):
            encoder.encode(prompt, raw=raw)


def test_the_limit_follows_the_longest_token(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    content = json.loads((folder / TOKENIZER).read_bytes())
    content["model"]["vocab"]["y" * 500] = 300
    (folder / TOKENIZER).write_text(json.dumps(content))
    stated = Manifest.from_bytes((folder / "manifest.json").read_bytes(), "m")
    rewrite_manifest(folder, stated)
    assert PromptEncoder(Bundle.open(folder)).max_characters == 512 * 500
