"""Answers a file of prompts, one JSON object {"prompt": …} a line, in order, with a bounded number in the queue.

python examples/batch_file.py bundles/smollm2-135m-instruct prompts.jsonl > answers.jsonl

`medusa-export generate BUNDLE --batch-file` does this for files in OpenAI's batch format, and resumes.
"""

import json
import sys
from collections import deque
from pathlib import Path

from medusa_runtime import Engine, RequestHandle, SamplingParams

AHEAD = 8  # requests whose prompts are encoded while earlier ones are answered


def write(handle: RequestHandle) -> None:
    """Print one answer as JSON."""
    result = handle.result()
    print(json.dumps({"text": result.text, "finish_reason": result.finish_reason}), flush=True)


with Engine.load(sys.argv[1]) as engine, Path(sys.argv[2]).open(encoding="utf-8") as lines:
    handles: deque[RequestHandle] = deque()
    for line in lines:
        handles.append(engine.submit(json.loads(line)["prompt"], SamplingParams(max_tokens=64)))
        if len(handles) > AHEAD:
            write(handles.popleft())
    while handles:
        write(handles.popleft())
