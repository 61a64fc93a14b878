"""How a text begins that the model writes by itself, for w8a8's measurement."""

from __future__ import annotations

from typing import Any

import pytest
from medusa_exporter.distillation.template_parts import first_turn_prefix, split_template
from medusa_exporter.generation_start import generation_start_ids
from medusa_runtime.errors import PromptError, UnsupportedModelError

DROPS_THINKING = (  # as Qwen3 and DeepSeek-R1's distilled models do
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_drops_earlier_thinking_serves(template: Any) -> None:
    tokenizer = template(DROPS_THINKING)
    with pytest.raises(PromptError, match="rewrites earlier answers"):
        split_template(tokenizer, (1,))
    assert tokenizer.decode(first_turn_prefix(tokenizer)) == "<|im_start|>user\n"
    assert tokenizer.decode(generation_start_ids(tokenizer, (1,))) == "<|im_start|>user\n"


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('a system message first') }}",
        "nothing of it",
        "{{ messages[0]['content'] * 2 }}",
        "{{ messages[0]['content'] }}",
        None,
    ],
)
def test_otherwise_a_text_begins_with_bos_or_else_eos(template: Any, text: str | None) -> None:
    tokenizer = template(text)
    assert generation_start_ids(tokenizer, (1,)) == [1]
    assert generation_start_ids(tokenizer, (7, 9)) == [7]
    tokenizer.bos_token = "<|im_start|>"
    assert generation_start_ids(tokenizer, (1,)) == [0]


def test_neither_is_told_in_words(template: Any) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"nor a bos or eos token; expected one.*w8a8.*--chat-template FILE"
    ):
        generation_start_ids(template(None), ())
