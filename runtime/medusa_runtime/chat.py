"""A model's chat template: how a conversation becomes the text that the model was trained on.

A template is code from wherever the model came from. It runs in Jinja's sandbox, with bounds on its steps, on the
values that its operators and calls make, and on what it writes; the width of a padded or formatted text is not bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from medusa_runtime.errors import PromptError

MAX_SOURCE = 1 << 20  # characters of a template
MAX_STEPS = 1_000_000  # loop rounds and calls of one rendering
MAX_LENGTH = 16 << 20  # characters or items of one value, and characters written
MAX_BITS = 4096  # of one number


class ChatTemplate:
    """A compiled template. `special_tokens` maps names that it may use, such as "bos_token", to their text.

    Raises PromptError if the template is not valid Jinja or too long.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        if len(source) > MAX_SOURCE:
            raise PromptError(f"the chat template has {len(source)} characters, expected at most {MAX_SOURCE}")
        try:
            self._template = _Sandbox().compiled(source)
        except Exception as error:  # Jinja's compiler and Python's raise many kinds
            raise PromptError(f"the chat template is not valid: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Lay out a conversation; with `add_generation_prompt` the text ends where the model's answer begins.

        Each message has "role" and "content". Raises PromptError, with the template's own words if it refuses the
        conversation.
        """
        _check_messages(messages)
        names = {
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        steps = _steps.set(_Steps())
        try:
            return "".join(_bounded(self._template.generate(names)))
        except Exception as error:  # a template may fail in any way that an expression can
            raise PromptError(f"the chat template cannot lay out this conversation: {error}") from error
        finally:
            _steps.reset(steps)


def _check_messages(messages: list[dict[str, str]]) -> None:
    if not messages:
        raise PromptError("the conversation is empty; give at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise PromptError(f"message {index} must have texts for 'role' and 'content', got {message!r:.80}")


def _bounded(pieces: Iterable[str]) -> Iterator[str]:
    written = 0
    for piece in pieces:
        written += len(piece)
        if written > MAX_LENGTH:
            raise SecurityError(f"it writes more than {MAX_LENGTH} characters")
        yield piece


@dataclass
class _Steps:
    taken: int = 0

    def take(self) -> None:
        self.taken += 1
        if self.taken > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")


_steps: ContextVar[_Steps] = ContextVar("steps of the rendering in progress")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its content is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 -- Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """`namespace(...)` whose attributes cannot pass for Python's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"an attribute of a namespace may not be called {name!r}")
        super().__setitem__(name, value)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with the names that templates on the Hugging Face Hub expect, and bounds."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace}

    def compiled(self, source: str) -> Template:
        """Compile a template whose every loop counts its rounds and whose every `~` checks the length it makes."""
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = self._call_of("count_rounds", [loop.iter])
        for join in list(tree.find_all(nodes.Concat)):
            join.nodes = [self._call_of("join", join.nodes)]
        return self.from_string(tree)

    def _call_of(self, method: str, arguments: list[Any]) -> nodes.Expr:
        call = nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)
        call.set_lineno(arguments[0].lineno).set_environment(self)
        return call

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call on behalf of the template, if the sandbox allows it."""
        _steps.get().take()
        return self._checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse to compute what would be too large, before it is computed."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise SecurityError(f"it computes a number of more than {MAX_BITS} bits")
        elif operator == "*":
            length = max(_length(left), _length(right)) * max(
                (n for n in (left, right) if isinstance(n, int)), default=1
            )
            if length > MAX_LENGTH:
                raise SecurityError(f"it makes a value longer than {MAX_LENGTH}")
        return self._checked(super().call_binop(context, operator, left, right))

    def count_rounds(self, items: Iterable[Any]) -> Iterator[Any]:
        """Give the items of a loop, each counted."""
        for item in items:
            _steps.get().take()
            yield item

    def join(self, *parts: Any) -> str:
        """Join texts, as `~` does."""
        return "".join(_bounded(map(str, parts)))

    def _checked(self, value: Any) -> Any:
        if _length(value) > MAX_LENGTH:
            raise SecurityError(f"it makes a value longer than {MAX_LENGTH}")
        return value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without escaping `<`, `>` and `&`, which Jinja's own filter does for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
