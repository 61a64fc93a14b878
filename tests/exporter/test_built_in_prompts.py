"""The prompts that are used where no file is given."""

from __future__ import annotations

from medusa_exporter.built_in_prompts import BUILT_IN_PROMPTS
from medusa_runtime.backends.base import PREFILL_CHUNK


def test_the_built_in_prompts_vary_and_one_is_long() -> None:
    assert len(BUILT_IN_PROMPTS) >= 5
    assert any(len(turns) > 1 for turns in BUILT_IN_PROMPTS)
    assert max(len(text.split()) for turns in BUILT_IN_PROMPTS for text in turns) > PREFILL_CHUNK
    assert len({text for turns in BUILT_IN_PROMPTS for text in turns}) == sum(map(len, BUILT_IN_PROMPTS))
