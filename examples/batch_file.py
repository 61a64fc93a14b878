"""Answers a file of prompts, one JSON object {"prompt": …} a line, in order, with a bounded number in the queue.

python examples/batch_file.py bundles/smollm2-135m-instruct prompts.jsonl > answers.jsonl

`medusa-export generate BUNDLE --batch-file` does this for files in OpenAI's batch format, and resumes.
"""

import json
import sys
from collections import deque
from pathlib import Path

from medusa_runtime import Engine, MedusaError, RequestHandle, SamplingParams

AHEAD = 8  # requests whose prompts are encoded while earlier ones are answered


def submit(engine: Engine, line: bytes) -> RequestHandle:
    """Queue the prompt of a line."""
    request = json.loads(line)
    if not isinstance(request, dict) or "prompt" not in request:
        raise ValueError('expected a JSON object with a prompt: {"prompt": "…"}')
    return engine.submit(request["prompt"], SamplingParams(max_tokens=64))


def write(handle: RequestHandle) -> None:
    """Print one answer as JSON."""
    result = handle.result()
    print(json.dumps({"text": result.text, "finish_reason": result.finish_reason}), flush=True)


if len(sys.argv) != 3:
    sys.exit(f"usage: python {sys.argv[0]} BUNDLE PROMPTS.jsonl")
failure = None
with Engine.load(sys.argv[1]) as engine, Path(sys.argv[2]).open("rb") as lines:
    handles: deque[RequestHandle] = deque()
    for number, line in enumerate(lines, start=1):
        try:
            handles.append(submit(engine, line))
        except (MedusaError, ValueError, RecursionError) as error:
            failure = f"{sys.argv[2]}:{number}: {error}; the lines before it were answered"
            break
        if len(handles) > AHEAD:
            write(handles.popleft())
    while handles:
        write(handles.popleft())
sys.exit(failure)
