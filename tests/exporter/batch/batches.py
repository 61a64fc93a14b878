"""Files of requests, and runs of `generate --batch-file` on them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medusa_runtime.openai_format import CHAT, COMPLETIONS

from ..bench.in_process import run


def chat(custom_id: str, text: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def completion(custom_id: str, prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": COMPLETIONS, "body": {"prompt": prompt, **fields}}


def write(file: Path, lines: Iterable[Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def answer(bundle: Path, file: Path, output: Path, *options: object) -> int:
    """The exit code of the command."""
    return run("generate", bundle, "--batch-file", file, "-o", output, "--threads", 1, *options)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def without_time(file: Path) -> list[dict[str, Any]]:
    """The responses without what depends on the run: when they were created, and what was computed before."""
    lines = lines_of(file)
    for line in lines:
        line["response"]["body"].pop("created", None)
        line["response"]["body"].get("usage", {}).pop("prompt_tokens_details", None)
    return lines
