"""Measure this project's backends and Hugging Face's `generate` on one GPU, alternating prompt by prompt.

    python benchmarks/hugging_face.py BUNDLE --model MODEL --prompts FILE --backends ort-cuda --json OUT

Hugging Face decodes each prompt twice: with its defaults, and with a static cache and `torch.compile` in the mode
"reduce-overhead" (CUDA graphs), which is its fastest mode. Answers have exactly `--max-new-tokens` tokens. The prefill
is timed separately, as the time to the first token. The JSON has the format of `medusa-export bench`, so that
`medusa-export report` can draw it.
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
from medusa_exporter.bench.conversations import Answerer, BackendMeasurements, ask_each, encode_conversation
from medusa_exporter.bench.results import Case, backend_facts, case_results, document
from medusa_exporter.bench.table import results_table
from medusa_exporter.bench.timing import WARM_TOKENS, Measurement, Question, TimedAnswer
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
    """A streamer that records when `generate` emits each token; `generate` first calls it with the prompt."""

    def __init__(self) -> None:
        """Start the clock."""
        self.started, self.ticks, self.tokens = time.perf_counter(), list[float](), list[int]()

    def put(self, value: torch.Tensor) -> None:
        """Record a token; the prompt is ignored."""
        if value.dim() == 1:
            self.tokens.append(int(value[0]))
            self.ticks.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing; the streamer interface needs it."""


class HuggingFace:
    """Greedy decoding with transformers."""

    def __init__(self, model: Any, longest: int, *, compiled: bool) -> None:
        """Use a model on a GPU. longest: the maximum number of tokens of prompt and answer together."""
        self._model = model
        self._cache = transformers.StaticCache(config=model.config, max_cache_len=longest) if compiled else None
        self._warm = False

    def answer(self, question: Question, shift: int) -> Measurement:  # noqa: ARG002
        """Answer with exactly `max_new_tokens` tokens."""
        if not self._warm:
            for tokens in (WARM_TOKENS, question.max_new_tokens):
                self._decode(question.ids, tokens)
            self._warm = True
        self._decode(question.ids, WARM_TOKENS)
        return Measurement(question, self._decode(question.ids, question.max_new_tokens), {})

    def _decode(self, ids: Sequence[int], tokens: int) -> TimedAnswer:
        prompt = torch.tensor([list(ids)], device=self._model.device)
        options: dict[str, Any] = {"generation_config": transformers.GenerationConfig(do_sample=False, pad_token_id=0)}
        if self._cache is not None:
            options["past_key_values"] = self._cache
        else:
            options["disable_compile"] = True
        clock = Clock()
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self._cache is not None:
                self._cache.reset()
            self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, streamer=clock, **options
            )
        steps = [after - before for before, after in zip(clock.ticks, clock.ticks[1:], strict=False)]
        first = clock.ticks[0] - clock.started
        return TimedAnswer(tuple(clock.tokens), (1,) * len(steps), first, tuple(steps), 0.0)


def facts_of(model: Any, precision: str, context: int) -> LoadedBackend:
    """Describe the model on its GPU in the same way as a backend."""
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
        weight_bytes=sum(one.numel() * one.element_size() for one in model.parameters()),
        kv_bytes_per_token=2 * config.num_hidden_layers * config.num_key_value_heads * head * size,
        bandwidth=None,
    )
    return LoadedBackend(facts, precision, context)


def main() -> None:
    """Parse the command line, measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="Bundle folder.")
    parser.add_argument(
        "--model",
        required=True,
        help="Model that the bundle was built from: Hugging Face hub name, folder or GGUF file.",
    )
    parser.add_argument("--prompts", type=Path, required=True, help='JSON Lines file, each line with "turns".')
    parser.add_argument("--backends", nargs="+", default=["ort-cuda"], help="Backends to measure (default: ort-cuda).")
    parser.add_argument("--profile", nargs="*", default=["tree-64"], help="Trees to measure (default: tree-64).")
    parser.add_argument("--precision", choices=DTYPES, default="fp16", help="Precision of all (default: fp16).")
    parser.add_argument("--limit", type=int, help="Use only the first LIMIT prompts.")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="Tokens per answer (default: 128).")
    parser.add_argument("--json", type=Path, required=True, help="File to write the results to.")
    options = parser.parse_args()
    check_output_file(options.json, OUTPUT, inputs=[options.prompts], bundle=options.bundle)
    bundle = Bundle.open(options.bundle)
    encoder, trees = PromptEncoder(bundle), [bundle.profile(name) for name in options.profile]
    prompts = [
        encode_conversation(encoder, [{"role": "user", "content": turns[0]}])
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
    hugging_face = {
        "transformers-compiled": HuggingFace(model, longest, compiled=True),
        "transformers-eager": HuggingFace(model, longest, compiled=False),
    }
    everyone: dict[str, Answerer] = {**workers, **hugging_face}
    done: list[BackendMeasurements] = []
    for answers in ask_each(everyone, prompts, options.max_new_tokens):
        done.append(answers)
        print(f"prompt {len(done)}/{len(prompts)}", flush=True)
    for worker in workers.values():
        worker.close()
    facts = facts_of(model, options.precision, longest)
    found_results = _results(
        Case(None, options.max_new_tokens), done, opened, dict.fromkeys(hugging_face, facts), trees
    )
    print(results_table(found_results))
    settings = {"profiles": [tree.name for tree in trees], "accept": "greedy", "forced": None}
    content = document(bundle, options.prompts, len(prompts), None, settings) | {
        "backends": {name: backend_facts(one) for name, one in (opened | dict.fromkeys(hugging_face, facts)).items()},
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
    """Return the results of plain decoding on all systems, then those of our trees."""
    plain = case_results(case, done, {**ours, **theirs}, [], [None] * len(done), stop_at_eos=False)
    fastest = max(plain, key=lambda one: one["tokens_per_second"] or 0.0)
    of_trees = [
        one
        | {
            "best_plain": fastest["backend"],
            "speedup_over_best_plain": one["tokens_per_second"] / fastest["tokens_per_second"],
        }
        for one in case_results(case, done, ours, trees, [None] * len(done), stop_at_eos=False)
        if one["nodes"] > 1
    ]
    return plain + of_trees


if __name__ == "__main__":
    main()
