"""Embeds the runtime in a program: load a bundle, answer one prompt at once and stream another one.

python examples/embed.py bundles/smollm2-135m-instruct
"""

import sys

from medusa_runtime import Engine, SamplingParams

if len(sys.argv) != 2:
    sys.exit(f"usage: python {sys.argv[0]} BUNDLE")
with Engine.load(sys.argv[1]) as engine:
    result = engine.generate("What is a hash table?", SamplingParams(max_tokens=48))
    print(result.text, result.usage, f"{result.tokens_per_step:.2f} tokens/step")
    for chunk in engine.submit("Name three colours.", SamplingParams(max_tokens=48, temperature=0.7, seed=1)):
        print(chunk.text, end="", flush=True)
    print()
