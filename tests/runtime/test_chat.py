"""Chat templates: equal to transformers' own rendering, and harmless."""

import datetime
import time

import pytest
from medusa_runtime.chat import MAX_LENGTH, ChatTemplate
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


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''|attr('__class__')|attr('__mro__') + 1 }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ '{0.__class__.__mro__}'.format(1) + 1 }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace(__html__=1) }}",
        "{% set n = namespace() %}{% set n.__html__ = 1 %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ range(10 ** 9) | list }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ [0] * 10 ** 12 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x.replace('x', 'xx') %}{% endfor %}",
        "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_hostile_and_broken_templates_are_refused(source):
    begun = time.monotonic()
    with pytest.raises(PromptError, match="chat template"):
        ChatTemplate(source, {}).render(CONVERSATIONS[0])
    assert time.monotonic() - begun < 20


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
