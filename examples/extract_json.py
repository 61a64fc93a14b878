"""Extracts facts from texts as JSON of a schema, and answers a second question about each without reading it again.

python examples/extract_json.py bundles/smollm2-135m-instruct "Anna Berg and Tom Reed meet in Berlin on 4 March."
"""

import json
import sys

from medusa_runtime import Engine, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "names": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 4},
        "place": {"type": "string", "maxLength": 30},
    },
    "required": ["names", "place"],
    "additionalProperties": False,
}

if len(sys.argv) < 3:
    sys.exit(f"usage: python {sys.argv[0]} BUNDLE TEXT …")
outputs = {"json": SCHEMA, "disable_any_whitespace": True}  # fewer tokens, and more of them are certain
with Engine.load(sys.argv[1], prefix_cache_bytes=256 << 20) as engine:
    for text in sys.argv[2:]:
        messages = [{"role": "user", "content": f"Who meets where? Answer as JSON.\n\n{text}"}]
        found = engine.generate(messages, SamplingParams(structured_outputs=outputs, max_tokens=200))
        if found.finish_reason == "stop":  # otherwise max_tokens cut it off
            print(json.loads(found.text), f"{found.tokens_per_step:.2f} tokens/step")
        messages += [
            {"role": "assistant", "content": found.text},
            {"role": "user", "content": "Is it about work or leisure?"},
        ]
        kind = engine.generate(messages, SamplingParams(structured_outputs={"choice": ["work", "leisure"]}))
        print(kind.text, f"{kind.cached_tokens} of {kind.usage.prompt_tokens} tokens were known")
    print(dict(engine.stats().steps_by_draft))
