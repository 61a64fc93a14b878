"""A service with nothing but asyncio: a JSON request on one line, a JSON chunk on each line of the response.

python examples/asyncio_service.py bundles/smollm2-135m-instruct --port 8000
echo '{"prompt": "Why is the sky blue?", "params": {"max_tokens": 40}}' | nc -N localhost 8000

A client that disconnects frees the engine for the next one within a step.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from typing import Any

from medusa_runtime import AsyncEngine, MedusaError, SamplingParams

LONGEST_LINE = 1 << 20  # bytes


async def answer(engine: AsyncEngine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one connection."""

    async def send(message: dict[str, Any]) -> None:
        writer.write(json.dumps(message).encode() + b"\n")
        await writer.drain()  # raises ConnectionError when the client has left

    try:
        request = json.loads(await reader.readline())
        params = SamplingParams.from_dict(request.get("params") or {})
        async with await engine.submit(request["prompt"], params, timeout=60, sanitize=True) as handle:
            async for chunk in handle:
                await send({"text": chunk.text, "finish_reason": chunk.finish_reason})
            usage = (await handle.result()).usage
        await send({"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens})
    except MedusaError as error:
        await send({"error": f"{type(error).__name__}: {error}"})
    except (ValueError, KeyError, AttributeError):
        await send({"error": 'expected one line with a JSON object like {"prompt": "…", "params": {…}}'})
    except ConnectionError:
        pass
    finally:
        writer.close()


async def main() -> None:
    """Serve until the process ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    async with await AsyncEngine.load(arguments.bundle) as engine:
        await engine.warm_up()
        server = await asyncio.start_server(
            lambda reader, writer: answer(engine, reader, writer), "127.0.0.1", arguments.port, limit=LONGEST_LINE
        )
        print(f"listening on port {server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
