"""Chat templates: equal to transformers' own rendering, and harmless."""

import datetime

import pytest
from medusa_runtime.chat_template import MAX_LENGTH, ChatTemplate
from medusa_runtime.errors import PromptError

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BUSY = """{{ bos_token }}{% set ns = namespace(turns=0, last='') %}
{%- for message in messages if message.role != 'tool' recursive %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {% if loop.last %}last of {{ loop.length }}, index {{ loop.index }}{% endif %}
    {{ message.role | upper ~ ':' ~ loop.index0 ~ none }} {{ message | tojson }}
    {% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}
    {% set ns.turns = ns.turns + 1 %}
    {% if ns.turns > 3 %}{% break %}{% endif %}
{%- endfor %}
{% for a in range(3) %}{% for b in 'xyz' %}{{ loop.previtem }}{{ b * 2 ** a }}{% endfor %}{% endfor %}
{{ tools is none }} {{ documents is none }} {{ missing is defined }}
{{ {'a': '<&>'} | tojson(indent=2) }} {{ ns.turns }}
{% macro shout(x) %}{{ x }}!{% endmacro %}{{ shout(messages[-1]['content']) }}"""

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "<b>é \U0001f642 & 'quotes'"}],
    [{"role": role, "content": f"  {role} {turn}\n"} for turn in range(3) for role in ("user", "assistant")],
]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", [SMOLLM2, BUSY])
def test_renders_as_transformers_does(template, messages, prompt):
    from transformers.utils.chat_template_utils import render_jinja_template as theirs

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered, _ = theirs([messages], chat_template=template, add_generation_prompt=prompt, **special)
    assert ChatTemplate(template, special).render(messages, prompt) == rendered[0]


def test_text_of_the_shipped_template():
    text = ChatTemplate(SMOLLM2, {}).render([{"role": "user", "content": "Hi"}])
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert text == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_date():
    year = ChatTemplate("{{ strftime_now('%Y') }}", {}).render(CONVERSATIONS[0])
    assert int(year) in (datetime.datetime.now().year, datetime.datetime.now().year - 1)


def test_the_templates_own_words_reach_the_user():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(PromptError, match="roles must alternate"):
        template.render(CONVERSATIONS[0])


FAMILIES = {  # in the manner of each family's own
    "chatml": SMOLLM2,
    "llama-3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "qwen-3": "{%- set ns = namespace(last=messages|length - 1) %}{%- for m in messages[::-1] %}{%- if m.role == "
    "'user' and not m.content.startswith('<tool_response>') %}{%- set ns.last = messages|length - "
    "loop.index %}{%- break %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{%- set content = m.content %}{%- if m.role == 'assistant' and "
    "'</think>' in content and loop.index0 <= ns.last %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and "
    "enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}",
    "mistral": "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = "
    "messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for m in rest %}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles alternate') }}{%- endif %}"
    "{%- if m['role'] == 'user' %}{%- if system is defined and loop.first %}{{- '[INST] ' + system + '\n\n' + "
    "m['content'] + '[/INST]' }}{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + m['content'] | trim + eos_token }}{%- endif %}{%- endfor %}",
    "gemma": "{{ bos_token }}{%- set ns = namespace(opening='') %}{%- for m in messages %}{%- if m.role == 'system' %}"
    "{%- set ns.opening = m.content | trim + '\n\n' %}{%- continue %}{%- endif %}{{ '<start_of_turn>' + ('model' if "
    "m.role == 'assistant' else m.role) + '\n' + ns.opening + m.content | trim + '<end_of_turn>\n' }}"
    "{%- set ns.opening = '' %}{%- endfor %}{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}",
    "phi-3": "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}{{ '<|' + m['role'] + '|>\n' "
    "+ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}",
}


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_laid_out_as_transformers_does(family, messages, prompt):
    from transformers.utils.chat_template_utils import render_jinja_template as theirs

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered, _ = theirs([messages], chat_template=FAMILIES[family], add_generation_prompt=prompt, **special)
    assert ChatTemplate(FAMILIES[family], special).render(messages, prompt) == rendered[0]
    assert messages[-1]["content"].strip() in rendered[0]


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{", "{% if x %}", "{{ " + "(" * 5000 + ")" * 5000 + " }}", "x" * 2**21]
)
def test_what_is_no_template_is_refused_when_compiled(source):
    with pytest.raises(PromptError, match="chat template"):
        ChatTemplate(source, {})


def test_output_is_bounded():
    message = {"role": "user", "content": "x" * (MAX_LENGTH // 2)}
    assert len(ChatTemplate("{{ messages[0].content }}", {}).render([message])) == MAX_LENGTH // 2
    with pytest.raises(PromptError, match="more than"):
        ChatTemplate("{{ messages[0].content }}" * 3, {}).render([message])


@pytest.mark.parametrize("messages", [[], [{}], [{"role": "user"}], [{"role": "user", "content": 3}], ["Hi"]])
def test_malformed_conversations_are_refused(messages):
    with pytest.raises(PromptError):
        ChatTemplate(SMOLLM2, {}).render(messages)


def test_rendering_leaves_the_messages_alone_and_counts_anew_each_time():
    template = ChatTemplate("{% for a in range(600) %}{% for b in range(900) %}{% endfor %}{% endfor %}ok", {})
    messages = [{"role": "user", "content": "Hi"}]
    assert [template.render(messages) for _ in range(3)] == ["ok"] * 3
    assert messages == [{"role": "user", "content": "Hi"}]


def test_what_json_cannot_hold_is_refused():
    for value in ({1, 2}, object()):
        with pytest.raises(PromptError, match="holds a value that JSON cannot represent"):
            ChatTemplate("x", {}).render([{"role": "user", "content": "Hi", "more": value}])
    with pytest.raises(PromptError, match=rf"{MAX_LENGTH + 1} characters, expected at most {MAX_LENGTH}"):
        ChatTemplate("x", {}).render([{"role": "", "content": "x" * (MAX_LENGTH + 1)}])


def test_lone_surrogates_are_carried():
    text = "a\ud800b\udfffc"
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": text}]) == text
