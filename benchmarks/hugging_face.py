"""Time our backends and Hugging Face's `generate` in turns, prompt by prompt, on one GPU.

    python benchmarks/hugging_face.py BUNDLE --model MODEL --prompts FILE --backends ort-cuda --json OUT

Hugging Face decodes twice: as it comes, and with a static cache and `torch.compile` (mode "reduce-overhead", so CUDA
graphs), which is its fastest. Answers have exactly `--max-new-tokens`; prefill is timed apart, as time to the first
token. The JSON is one of `medusa-export bench`, so `medusa-export report` draws it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from medusa_exporter import models
from medusa_exporter.bench.conversations import Answerer, BackendMeasurements, ask_each, encode
from medusa_exporter.bench.results import Case, backend_facts, document, results
from medusa_exporter.bench.table import table
from medusa_exporter.bench.timing import WARM_TOKENS, Generation, Measurement, Question
from medusa_exporter.bench.worker import LoadedBackend, Worker, WorkerSettings
from medusa_exporter.files import write_json
from medusa_exporter.models import ModelSource
from medusa_exporter.output_kinds import BENCH
from medusa_exporter.overwrite_check import JsonKind, check_output_file
from medusa_exporter.prompts import load_prompts
from medusa_runtime.backends.base import BackendFacts
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import MedusaError
from medusa_runtime.prompt_encoder import PromptEncoder

OUTPUT = JsonKind("benchmarks/hugging_face.py", BENCH.keys)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Clock:
    """What `generate` calls with the prompt, then with every token as it is known."""

    def __init__(self) -> None:
        """Start."""
        self.started, self.ticks, self.tokens = time.perf_counter(), list[float](), list[int]()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token after the other."""
        if value.dim() == 1:
            self.tokens.append(int(value[0]))
            self.ticks.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


class HuggingFace:
    """Plain greedy decoding by transformers."""

    def __init__(self, model: Any, longest: int, *, compiled: bool) -> None:
        """Take a model on a GPU. longest: tokens that prompt and answer come to at most."""
        self._model = model
        self._cache = transformers.StaticCache(config=model.config, max_cache_len=longest) if compiled else None
        self._seen = False

    def answer(self, question: Question, shift: int) -> Measurement:  # noqa: ARG002
        """Answer with exactly as many tokens as are asked for."""
        if not self._seen:
            for tokens in (WARM_TOKENS, question.max_new_tokens):
                self._decode(question.ids, tokens)
            self._seen = True
        self._decode(question.ids, WARM_TOKENS)
        return Measurement(question, self._decode(question.ids, question.max_new_tokens), {})

    def _decode(self, ids: Sequence[int], tokens: int) -> Generation:
        prompt = torch.tensor([list(ids)], device=self._model.device)
        given: dict[str, Any] = {"generation_config": transformers.GenerationConfig(do_sample=False, pad_token_id=0)}
        if self._cache is not None:
            given["past_key_values"] = self._cache
        else:
            given["disable_compile"] = True
        clock = Clock()
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self._cache is not None:
                self._cache.reset()
            self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, streamer=clock, **given
            )
        steps = [after - before for before, after in zip(clock.ticks, clock.ticks[1:], strict=False)]
        first = clock.ticks[0] - clock.started
        return Generation(tuple(clock.tokens), (1,) * len(steps), first, tuple(steps), 0.0)


def facts_of(model: Any, precision: str, context: int) -> LoadedBackend:
    """Describe it as a backend is described."""
    config = model.config
    size = next(model.parameters()).element_size()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    facts = BackendFacts(
        device=torch.cuda.get_device_name(),
        driver="",
        capability=capability,
        library=f"transformers {transformers.__version__}, torch",
        version=torch.__version__,
        weights=sum(one.numel() * one.element_size() for one in model.parameters()),
        row=2 * config.num_hidden_layers * config.num_key_value_heads * head * size,
        bandwidth=None,
    )
    return LoadedBackend(facts, precision, context)


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", required=True, help="What the bundle was built from: hub name, folder or GGUF file.")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--backends", nargs="+", default=["ort-cuda"])
    parser.add_argument("--profile", nargs="*", default=["tree-64"])
    parser.add_argument("--precision", choices=DTYPES, default="fp16")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    check_output_file(options.json, OUTPUT, inputs=[options.prompts], bundle=options.bundle)
    bundle = Bundle.open(options.bundle)
    encoder, trees = PromptEncoder(bundle), [bundle.profile(name) for name in options.profile]
    prompts = [
        encode(encoder, [{"role": "user", "content": turns[0]}])
        for turns in load_prompts(options.prompts, options.limit)
    ]
    workers = {name: Worker(name) for name in options.backends}
    opened: dict[str, LoadedBackend] = {}
    for name, worker in workers.items():
        found = worker.open(WorkerSettings(bundle, trees, options.precision))
        if found is None:
            raise MedusaError(str(worker.failure))
        opened[name] = found
    model = models.load_model(ModelSource.resolve(options.model), DTYPES[options.precision], "cuda")
    longest = max(map(len, prompts)) + options.max_new_tokens
    theirs = {
        "transformers-compiled": HuggingFace(model, longest, compiled=True),
        "transformers-eager": HuggingFace(model, longest, compiled=False),
    }
    everyone: dict[str, Answerer] = {**workers, **theirs}
    done: list[BackendMeasurements] = []
    for answers in ask_each(everyone, prompts, options.max_new_tokens):
        done.append(answers)
        print(f"prompt {len(done)}/{len(prompts)}", flush=True)
    for worker in workers.values():
        worker.close()
    facts = facts_of(model, options.precision, longest)
    found_results = _results(Case(None, options.max_new_tokens), done, opened, dict.fromkeys(theirs, facts), trees)
    print(table(found_results))
    settings = {"profiles": [tree.name for tree in trees], "accept": "greedy", "forced": None}
    content = document(bundle, options.prompts, len(prompts), None, settings) | {
        "backends": {name: backend_facts(one) for name, one in (opened | dict.fromkeys(theirs, facts)).items()},
        "failures": {name: worker.failure for name, worker in workers.items() if worker.failure},
        "results": found_results,
    }
    content["prompts"]["turns"] = len(done)
    write_json(options.json, OUTPUT.marked(content))


def _results(
    case: Case,
    done: Sequence[BackendMeasurements],
    ours: Mapping[str, LoadedBackend],
    theirs: Mapping[str, LoadedBackend],
    trees: Sequence[Any],
) -> list[dict[str, Any]]:
    """Plain decoding of all beside each other, and our trees over the fastest of it."""
    plain = results(case, done, {**ours, **theirs}, [], [None] * len(done), ends=False)
    fastest = max(plain, key=lambda one: one["tokens_per_second"] or 0.0)
    of_trees = [
        one
        | {
            "best_plain": fastest["backend"],
            "speedup_over_best": one["tokens_per_second"] / fastest["tokens_per_second"],
        }
        for one in results(case, done, ours, trees, [None] * len(done), ends=False)
        if one["nodes"] > 1
    ]
    return plain + of_trees


if __name__ == "__main__":
    main()
