"""Renders chat templates in a separate process with limited memory and time that cannot write files.

`template_process` runs this file as a script, so it imports nothing from this package. A request and a response are
each a length of eight bytes, big-endian, followed by that many bytes of JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import struct
import sys
import time
from collections.abc import Collection, Iterator
from datetime import datetime
from functools import lru_cache
from typing import IO, Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_LENGTH = 16 << 20  # characters of a rendered text
MAX_BYTES = 160 << 20  # of a request or a response
MEMORY = 1 << 30  # bytes of address space
CPU_SECONDS = 2  # CPU time of one rendering
HEADER = struct.Struct(">Q")
_MAX_ERROR = 1000  # characters of a template's error message
_COMPILED = 8  # compiled templates in the cache
_FIRST_SHADOW, _SHADOWS = 0xD800, 2048  # lone surrogates: no valid text contains them
_INSPECTING = {
    *("startswith", "endswith", "removeprefix", "removesuffix", "split", "rsplit", "partition", "rpartition"),
    *("strip", "lstrip", "rstrip", "trim", "find", "rfind", "index", "rindex", "count", "replace", "get"),
}  # methods and filters whose first argument is compared with a text and not written


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the assistant's text for training; its content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 -- Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """Jinja's `namespace(...)`, but without attributes that start with an underscore, such as `__class__`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"an attribute of a namespace may not be called {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` without Jinja's escaping of `<`, `>` and `&` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _sandbox() -> ImmutableSandboxedEnvironment:
    """Return a Jinja sandbox with the functions and filters that templates on the Hugging Face Hub expect."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], cache_size=0
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals |= {"raise_exception": _raise_exception, "namespace": _Namespace}
    return sandbox


def shadow_table(controls: Collection[str]) -> dict[int, int]:
    """Return the shadow of each character of control tokens, except white space, for `str.translate`.

    Raises:
        ValueError: The control tokens have more different characters than there are shadows.
    """
    letters = sorted(letter for letter in set().union(*controls) if not letter.isspace())
    if len(letters) > _SHADOWS:
        raise ValueError(f"{len(letters)} different characters, expected at most {_SHADOWS}")
    return {ord(letter): _FIRST_SHADOW + index for index, letter in enumerate(letters)}


class _Marker:
    """Writes a template's own control tokens with shadow characters, so that they differ from those of messages.

    Constants may also be parts of control tokens: `'<|' + message.role + '|>'`. So a constant's end that begins a
    control token, and a beginning that ends one, are written with shadows too.
    """

    def __init__(self, controls: tuple[str, ...]) -> None:
        self.table = shadow_table(controls)
        self._whole = re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))) or "(?!)")
        cuts = [(token, at) for token in controls for at in range(1, len(token))]
        self._heads = {token[:at] for token, at in cuts if not _is_word(token[0])}
        self._tails = {token[at:] for token, at in cuts if not _is_word(token[-1])}
        self._longest = max(map(len, controls), default=0)

    def mark(self, text: str) -> str:
        text = self._whole.sub(lambda found: found[0].translate(self.table), text)
        sizes = range(min(len(text), self._longest), 0, -1)
        if size := next((size for size in sizes if text[:size] in self._tails), 0):
            text = text[:size].translate(self.table) + text[size:]
        if size := next((size for size in sizes if text[-size:] in self._heads), 0):
            text = text[:-size] + text[-size:].translate(self.table)
        return text

    def mark_tree(self, tree: nodes.Template, special: Collection[str]) -> None:
        """Mark the texts of a template, except those that it compares with others.

        Args:
            tree: The parsed template, which is changed.
            special: Names of variables whose values are marked.
        """
        compared = {id(const) for const in _compared_constants(tree, special)}
        for data in tree.find_all(nodes.TemplateData):
            data.data = self.mark(data.data)
        for const in tree.find_all(nodes.Const):
            if isinstance(const.value, str) and id(const) not in compared:
                const.value = self.mark(const.value)


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _compared_constants(tree: nodes.Template, special: Collection[str]) -> Iterator[nodes.Node]:
    """Yield the constants that are keys, or that a template compares with texts or searches in them."""
    found: list[nodes.Node] = []
    for compare in tree.find_all(nodes.Compare):
        operands = [compare.expr, *(operand.expr for operand in compare.ops)]
        if not any(isinstance(one, nodes.Name) and one.name in special for one in operands):
            found += operands
    for call in tree.find_all(nodes.Call):
        found += call.args[:1] if getattr(call.node, "attr", None) in _INSPECTING else []
    for filtered in tree.find_all(nodes.Filter):
        found += filtered.args[:1] if filtered.name in _INSPECTING else []
    for test in tree.find_all(nodes.Test):
        found += [test.node, *test.args]
    found += [item.arg for item in tree.find_all(nodes.Getitem)]
    found += [pair.key for pair in tree.find_all(nodes.Pair)]
    for node in found:
        yield from [node, *node.items] if isinstance(node, (nodes.Tuple, nodes.List)) else [node]


@lru_cache(_COMPILED)
def _marker(controls: tuple[str, ...]) -> _Marker:
    return _Marker(controls)


@lru_cache(_COMPILED)
def _compiled(source: str, controls: tuple[str, ...] = (), special: tuple[str, ...] = ()) -> Template:
    sandbox = _sandbox()
    if not controls:
        return sandbox.from_string(source)
    tree = sandbox.parse(source)
    _marker(controls).mark_tree(tree, special)
    return Template.from_code(sandbox, sandbox.compile(tree), sandbox.make_globals(None))


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Compile the request's "source" and, unless its "names" are None, render it with these variables.

    With "controls", a list of control tokens, those that the template writes, also by the variables that the list
    "special" names, are written with the characters of `shadow_table`. The text must otherwise be the same.

    Return the rendered "text", or the reason of the failure as "error".
    """
    try:
        template = _compiled(request["source"])
        if request["names"] is None:
            return {"text": ""}
        names = {"strftime_now": datetime.now().strftime, **request["names"]}
        text = _rendered(template, names)
        return {"text": _marked(request, names, text) if request.get("controls") else text}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:
        return {"error": str(error)[:_MAX_ERROR] or type(error).__name__}


def _marked(request: dict[str, Any], names: dict[str, Any], text: str) -> str:
    controls, special = tuple(request["controls"]), tuple(request["special"])
    marker = _marker(controls)
    shown = {name: marker.mark(names[name]) for name in special}
    marked = _rendered(_compiled(request["source"], controls, special), names | shown)
    if marked.translate({shadow: letter for letter, shadow in marker.table.items()}) != text:
        raise SecurityError(
            "its own control tokens cannot be told from those in messages, since it changes or compares them; remove "
            "control tokens from the messages, or pass sanitize=False"
        )
    return marked


def _rendered(template: Template, names: dict[str, Any]) -> str:
    pieces: list[str] = []
    written = 0
    for piece in template.generate(names):
        written += len(piece)
        if written > MAX_LENGTH:
            raise SecurityError(f"it writes more than {MAX_LENGTH} characters")
        pieces.append(piece)
    return "".join(pieces)


def pack_message(content: object) -> bytes:
    """Return the bytes of a request or a response; lone surrogates are kept."""
    data = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return HEADER.pack(len(data)) + data


def read_message(pipe: IO[bytes]) -> Any:
    """Read what `pack_message` wrote. Raises EOFError at the pipe's end, ValueError for a message that is too long."""
    (size,) = HEADER.unpack(_exactly(pipe, HEADER.size))
    if size > MAX_BYTES:
        raise ValueError(f"a message of {size} bytes, expected at most {MAX_BYTES}")
    return json.loads(_exactly(pipe, size).decode("utf-8", "surrogatepass"))


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = pipe.read(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError("the other side has ended")
        data += piece
    return bytes(data)


def _limit() -> Any:
    """Apply the system's resource limits; return a function that limits the CPU time of the next rendering."""
    try:
        import resource
    except ImportError:  # Windows: only the wall-clock time is limited, by the parent
        return lambda: None
    for name, most in (("AS", MEMORY), ("CORE", 0), ("FSIZE", 0), ("NPROC", 0)):
        limit = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(limit)[1]
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS does not limit the address space
            resource.setrlimit(limit, (allowed, allowed))

    def limit_time() -> None:
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + CPU_SECONDS, hard))

    return limit_time


def main() -> None:
    """Answer requests from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    datetime.now().strftime("%Y")  # loads the time zone before the limits apply
    limit_time = _limit()
    while True:
        try:
            request = read_message(requests)
        except EOFError:
            return
        limit_time()
        answers.write(pack_message(answer(request)))
        answers.flush()


if __name__ == "__main__":
    main()
