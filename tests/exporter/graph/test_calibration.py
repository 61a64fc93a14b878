"""The texts on which w8a8 measures activations stay within the bundle's context, where its rotary tables end."""

from __future__ import annotations

import pytest
from medusa_exporter.graph.calibration import MAX_NEW_TOKENS, TEXTS, generate_texts

from .conftest import make_model


@pytest.mark.parametrize(
    ("opening", "context", "length"),
    [
        (3, 512, 3 + MAX_NEW_TOKENS),
        (3, 64, 64),
        (63, 64, 64),
        (64, 64, 64),
        (200, 64, 64),
        (1, 1 + MAX_NEW_TOKENS, 1 + MAX_NEW_TOKENS),
    ],
)
def test_texts_end_within_the_context(opening: int, context: int, length: int) -> None:
    model = make_model("llama")
    model.config.eos_token_id = None
    texts = generate_texts(model, list(range(2, 2 + opening)), context)
    assert {len(text) for text in texts} == {length} and len(texts) == TEXTS
    kept = min(opening, context // 2)
    assert all(text[:kept] == list(range(2, 2 + kept)) for text in texts)
