"""A service with nothing but asyncio: a JSON request on one line, a JSON chunk on each line of the response.

python examples/asyncio_service.py bundles/smollm2-135m-instruct --port 8000
echo '{"prompt": "Why is the sky blue?", "params": {"max_tokens": 40}}' | nc -N localhost 8000

Errors are objects of one line too, in the form of OpenAI's API. A client that disconnects frees the engine for the next
one within a step.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from medusa_runtime import AsyncEngine, SamplingParams
from medusa_runtime.errors import ArgumentError
from medusa_runtime.openai_format import error_body, status_of

LONGEST_LINE = 1 << 20  # bytes


async def serve(engine: AsyncEngine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one connection; ConnectionError means that the client has left."""
    with contextlib.suppress(ConnectionError), contextlib.closing(writer):
        async with contextlib.aclosing(answer(engine, reader)) as messages:
            async for message in messages:
                writer.write(json.dumps(message).encode() + b"\n")
                await writer.drain()


async def answer(engine: AsyncEngine, reader: asyncio.StreamReader) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the objects of the response; an error is the last one."""
    try:
        prompt, params = await read(reader)
        async with await engine.submit(prompt, params, timeout=60, sanitize=True) as handle:
            async for chunk in handle:
                yield {"text": chunk.text, "finish_reason": chunk.finish_reason}
            usage = (await handle.result()).usage
        yield {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    except ConnectionError:
        raise
    except Exception as error:
        status = status_of(error)
        if status == 500:
            logging.exception("a request failed")  # its message may show paths, so that clients do not get it
        yield error_body(error, status)


async def read(reader: asyncio.StreamReader) -> tuple[Any, SamplingParams]:
    """Return the prompt and the parameters of a request."""
    try:
        request = json.loads(await reader.readline())
        prompt, params = request["prompt"], request.get("params") or {}
        if isinstance(prompt, (str, list)):
            return prompt, SamplingParams.from_dict(params)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ArgumentError('expected one line with a JSON object like {"prompt": "…", "params": {…}}')


async def main() -> None:
    """Serve until the process ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    async with await AsyncEngine.load(arguments.bundle) as engine:
        await engine.warm_up()
        server = await asyncio.start_server(
            lambda reader, writer: serve(engine, reader, writer), "127.0.0.1", arguments.port, limit=LONGEST_LINE
        )
        print(f"listening on port {server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
