"""Renders chat templates in a separate process with limited memory and time that cannot write files.

`template_process` runs this file as a script, so it imports nothing from this package. A request and a response are
each a length of eight bytes, big-endian, followed by that many bytes of JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import struct
import sys
import time
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


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


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
    sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace}
    return sandbox


@lru_cache(_COMPILED)
def _compiled(source: str) -> Template:
    return _sandbox().from_string(source)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Compile the request's "source" and, unless its "names" are None, render it with these variables.

    Return the rendered "text", or the reason of the failure as "error".
    """
    try:
        template = _compiled(request["source"])
        return {"text": "" if request["names"] is None else _rendered(template, request["names"])}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:
        return {"error": str(error)[:_MAX_ERROR] or type(error).__name__}


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
    _strftime_now("%Y")  # loads the time zone before the limits apply
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
