"""Text to token ids by a bundle's chat template; the words of each refusal are tested in test_engine.py."""

from __future__ import annotations

from pathlib import Path

from medusa_runtime import Engine
from medusa_runtime.bundle import Bundle
from medusa_runtime.layout import Layout


def test_it_lays_out_as_the_engine_does(tiny_bundle: Path) -> None:
    layout, engine = Layout(Bundle.open(tiny_bundle)), Engine.load(tiny_bundle, profile="plain", threads=1)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well?"}]
    assert layout.has_template
    for prompt in ("Hello", messages):
        assert layout.encode(prompt) == engine.encode(prompt)
    assert layout.encode("Hello", raw=True) == engine.encode("Hello", raw=True) != engine.encode("Hello")
