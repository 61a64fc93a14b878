"""Hostile chat templates: whatever one does, it ends within seconds, in little memory and with a typed error."""

import time

import psutil
import pytest
from medusa_runtime.chat_template import ChatTemplate
from medusa_runtime.errors import PromptError
from medusa_runtime.template_process import SECONDS

MESSAGES = [{"role": "user", "content": "Hi"}]

FORBIDDEN = [
    "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__')|attr('__mro__') + 1 }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ '{0.__class__.__mro__}'.format(1) + 1 }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ ['{0.__class__}']|map('format', 1)|list + 1 }}",
    "{{ namespace(__html__=1) }}",
    "{% set n = namespace() %}{% set n.__html__ = 1 %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ 1 / 0 }}",
    "{{ nothing.at.all }}",
]
LARGE = [  # values of more memory than there is, by every operator, block and filter that makes one
    "{{ range(10 ** 9) | list }}",
    "{{ 'x' * 10 ** 12 }}",
    "{{ [0] * 10 ** 12 }}",
    "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x.replace('x', 'xx') %}{% endfor %}",
    "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x|replace('x', 'xx') %}{% endfor %}",
    "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = [n.x, n.x]|join %}{% endfor %}",
    "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x.join(n.x) %}{% endfor %}",
    "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = '%s%s'|format(n.x, n.x) %}{% endfor %}",
    "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='xx') %}"
    "{% for i in range(99) %}{% set n.x = twice(n.x) %}{% endfor %}",
    "{% macro twice() %}{{ caller() }}{{ caller() }}{% endmacro %}{% set n = namespace(x='xx') %}"
    "{% for i in range(99) %}{% set n.x %}{% call twice() %}{{ n.x }}{% endcall %}{% endset %}{% endfor %}",
    "{% set n = namespace(x='x<') %}{% for i in range(99) %}{% set n.x %}{% filter replace('x', 'xx') %}{{ n.x }}"
    "{% endfilter %}{% endset %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}",
    "{% set n = namespace(x={}) %}{% for i in range(99) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}{{ n.x|pprint }}",
    "{{ 'x'|center(10 ** 12) }}",
    "{{ 'x'.center(10 ** 12) }}",
    "{{ 'x'.ljust(10 ** 12) }}{{ 'x'.rjust(10 ** 12) }}{{ 'x'.zfill(10 ** 12) }}",
    "{{ 'a\tb'.expandtabs(2 ** 31 - 1) }}",
    "{{ 'a\nb'|indent(10 ** 12) }}",
    "{{ ('a\n' * 10 ** 6)|indent(10 ** 6) }}",
    "{{ '%1000000000000d' % 1 }}",
    "{{ '%10000000000d'|format(1) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ '%.10000000000f' % 1 }}",
    "{{ [1]|tojson(indent=10 ** 11) }}",
    "{{ ('x' * 10 ** 8)|wordwrap(1, wrapstring='y' * 100) }}",
    "{{ [1]|batch(10 ** 10, 'x')|list }}",
    "{{ ('x' * 10 ** 8)|list|slice(3)|list }}",
    "{{ ('x' * 10 ** 8)|list|sort }}",
    "{{ ('x' * 10 ** 8)|list|groupby(0) }}",
    "{{ ('http://a.b ' * 10 ** 7)|urlize(rel='x' * 1000) }}",
    "{{ dict(a='<' * 10 ** 9)|xmlattr }}",
    "{{ ('<' * 10 ** 9)|escape }}",
    "{{ ('x' * 10 ** 9)|urlencode }}",
    "{{ ('x' * 10 ** 8)|map('upper')|list }}",
    "{{ ('x' * 10 ** 8)|select|list }}{{ ('x' * 10 ** 8)|unique|list }}",
    "{{ lipsum(n=10 ** 6) }}",
    "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "{{ ('x' * 10 ** 8).translate({120: 'y' * 10 ** 5}) }}",
    "{{ ('x' * 10 ** 9).encode('utf-32') }}",
    "{{ raise_exception('x' * 10 ** 9) }}",
]
LONG = [  # more work than there is time for
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f() %}{% call f() %}{% endcall %}{% endmacro %}{{ f() }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 2 ** (2 ** 40) }}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = 'x' * 10 ** 6 %}{% set y = x|upper|lower|title|striptags %}{% endfor %}",
    "{% set x = messages[0].content * 10 ** 7 %}{% for i in range(9999) %}{{ x|wordcount - 1 }}{% endfor %}",
    "{% set x = messages[0].content * 10 ** 7 %}{% for i in range(999) %}{{ x ~ 'y' in x ~ x }}{% endfor %}",
    "{{ range(99999)|sum(start=[]) }}" + "{% for i in range(99999) %}{% set x = range(99999)|sum %}{% endfor %}",
]


@pytest.mark.parametrize("source", [*FORBIDDEN, *LARGE, *LONG])
def test_hostile_and_broken_templates_are_refused(source):
    """Each within seconds, and without this process growing."""
    ChatTemplate("warm", {}).render(MESSAGES)
    begun, before = time.monotonic(), psutil.Process().memory_info().rss
    with pytest.raises(PromptError, match="chat template"):
        ChatTemplate(source, {}).render(MESSAGES)
    assert time.monotonic() - begun < SECONDS
    assert psutil.Process().memory_info().rss < before + (64 << 20)
    assert ChatTemplate("{{ messages[0].content }}", {}).render(MESSAGES) == "Hi"
