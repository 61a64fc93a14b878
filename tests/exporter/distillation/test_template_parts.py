import numpy as np
import pytest
from medusa_exporter.distillation import template_parts
from medusa_exporter.prompts import prompt_ids
from medusa_runtime.errors import PromptError

EOS = (1,)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}{{ '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_the_template_is_cut_into_its_pieces(tokenizer):
    found = template_parts.split_template(tokenizer, EOS)
    assert tokenizer.decode(found.before_user) == "<|im_start|>user\n"
    assert tokenizer.decode(found.user_to_answer) == "\n<|im_start|>assistant\n"  # less the end of the turn before
    assert tokenizer.decode(found.answer_to_user) == "\n<|im_start|>user\n"
    assert found.ends == template_parts.EndTokens(EOS, user=1, answer=1)


def test_an_end_that_is_no_eos_belongs_to_what_follows(tokenizer):
    found = template_parts.split_template(tokenizer, (0,))
    assert found.ends == template_parts.EndTokens((0,), user=1, answer=None)
    assert tokenizer.decode(found.answer_to_user) == "<|im_end|>\n<|im_start|>user\n"


def test_without_a_special_token_the_model_cannot_end_a_user_turn(template):
    tokenizer = template(PLAIN)
    found = template_parts.split_template(tokenizer, EOS)
    assert found.ends == template_parts.EndTokens(EOS, user=None, answer=1)
    assert tokenizer.decode(found.user_to_answer) == "\nassistant: "


def test_later_turns_with_the_answers_between_are_the_template_s_own_tokens(tokenizer):
    turns, answers = ("one", " two\n", "three"), ("a", "b")
    later = template_parts.later_turns(tokenizer, turns, EOS)
    messages = [{"role": "user", "content": turns[0]}]
    (whole,) = prompt_ids(tokenizer, [messages])
    for turn, answer, given in zip(turns[1:], answers, later, strict=True):
        whole = [*whole, *template_parts.encode(tokenizer, answer), 1, *given]
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        assert [whole] == prompt_ids(tokenizer, [messages])


def test_space_before_an_end_is_the_model_s_to_leave_out(tokenizer):
    end, ids = template_parts.split_end(tokenizer, " <|im_end|>\n", EOS)
    assert end == 1
    assert tokenizer.decode(ids) == "\n"
    end, ids = template_parts.split_end(tokenizer, " next", EOS)
    assert end is None
    assert tokenizer.decode(ids) == " next"
    assert template_parts.encode(tokenizer, "").dtype == np.int64


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nothing of it", "in their order"),
        ("{{ messages[-1]['content'] }}", "in their order"),
        ("{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}", "differently when"),
        (
            "{% for m in messages %}{{ loop.length ~ m['content'] ~ loop.length }}{% endfor %}",
            "differently when",
        ),
        (
            "{% for m in messages %}{{ '|' + m['content'].split('</think>')[-1] }}{% endfor %}"
            "{% if add_generation_prompt %}|{% endif %}",
            "rewrites earlier answers",
        ),
        ("{{ raise_exception('no') }}", "refuses"),
    ],
)
def test_a_template_that_cannot_be_cut_is_refused(template, text, reason):
    with pytest.raises(PromptError, match=reason):
        template_parts.split_template(template(text), EOS)
