"""Measures one system: reads a job from standard input and writes a report to standard output.

A job is a JSON object: `system` is a key of RUNNERS; `prompts` are lists of token ids; `max_new_tokens`,
`warm_up_tokens`, `threads` and `attempts` are numbers; other keys depend on the system. Every answer has exactly
`max_new_tokens` tokens, chosen greedily. This project is imported only to measure its own decoder, so that a peer can
run in another Python environment.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

QUIET = 0.03  # share of the processors that other processes may use during an undisturbed answer

Job = dict[str, Any]
# A system under test: a function of a prompt and a number of tokens. It returns an iterator over the tokens of the
# prefill, then over the tokens that each decoding step adds.
Answer = Callable[[list[int], int], Iterator[list[int]]]


def open_medusa(job: Job) -> Answer:
    """Open this project's decoder with the tree `profile`, or with plain decoding if that is null."""
    from medusa_profiles.profile import TreeProfile
    from medusa_runtime.backends import load_backend
    from medusa_runtime.bundle import Bundle
    from medusa_runtime.decoder import Decoder

    bundle = Bundle.open(job["bundle"])
    profile = bundle.profile(job["profile"]) if job["profile"] else TreeProfile.plain()
    decoder = Decoder(load_backend(bundle, job["backend"], job["precision"], job["threads"]), profile)

    def answer(prompt: list[int], tokens: int) -> Iterator[list[int]]:
        yield decoder.start(prompt, tokens, stop_ids=())
        while decoder.sequence is not None and decoder.sequence.finish_reason is None:
            yield decoder.step()

    return answer


def open_genai(job: Job) -> Answer:
    """Open onnxruntime-genai with the folder `model` from its own builder, and the options that the builder has set."""
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(job["model"])
    session = {"intra_op_num_threads": job["threads"]}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)

    def answer(prompt: list[int], tokens: int) -> Iterator[list[int]]:
        parameters = og.GeneratorParams(model)
        length = len(prompt) + tokens
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.asarray([prompt], dtype=np.int32))  # runs the prefill
        while not generator.is_done():
            generator.generate_next_token()  # the first call only samples from the prefill's logits
            yield [int(token) for token in generator.get_next_tokens()]

    return answer


def open_llama(job: Job) -> Answer:
    """Open llama.cpp with a .gguf file, through the C interface of llama-cpp-python; argmax is computed with numpy."""
    import llama_cpp
    import numpy as np

    llama = llama_cpp.Llama(
        job["model"], n_ctx=2048, n_threads=job["threads"], n_threads_batch=job["threads"], verbose=False
    )
    vocabulary = llama.n_vocab()

    def next_token() -> int:
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())

    def answer(prompt: list[int], tokens: int) -> Iterator[list[int]]:
        llama.reset()
        llama.eval(prompt)
        token = next_token()
        yield [token]
        for _ in range(tokens - 1):
            llama.eval([token])
            token = next_token()
            yield [token]

    return answer


RUNNERS: dict[str, tuple[Callable[[Job], Answer], tuple[str, ...]]] = {
    "medusa": (open_medusa, ("medusa-export", "onnxruntime", "numpy")),
    "genai": (open_genai, ("onnxruntime-genai", "onnxruntime", "numpy")),
    "llama.cpp": (open_llama, ("llama-cpp-python", "numpy")),
}


def measure(answer: Answer, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Decode one answer; the prefill and the first token, which it produces, are timed separately."""
    others = _OtherLoad()
    started = time.perf_counter()
    steps = answer(prompt, tokens)
    found = list(next(steps))
    times = [time.perf_counter()]
    for added in steps:
        found += added
        times.append(time.perf_counter())
    seconds = [after - before for before, after in itertools.pairwise(times)]
    if len(found) != tokens or not seconds:
        raise RuntimeError(f"the answer has {len(found)} tokens in {len(seconds)} steps, expected {tokens} tokens")
    return {
        "prompt_tokens": len(prompt),
        "prefill_seconds": times[0] - started,
        "decode_seconds": times[-1] - times[0],
        "median_step_seconds": statistics.median(seconds),
        "other_load": others.share(),
        "steps": len(seconds),
        "tokens": tokens - 1,  # added by steps
        "answer": found,
    }


def least_disturbed(answer: Answer, prompt: list[int], tokens: int, attempts: int) -> dict[str, Any]:
    """Decode an answer until no other process disturbs it, at most `attempts` times; return the least disturbed one."""
    measured: list[dict[str, Any]] = []
    while len(measured) < attempts and not (measured and measured[-1]["other_load"] < QUIET):
        measured.append(measure(answer, prompt, tokens))
    return min(measured, key=lambda one: float(one["other_load"]))


class _OtherLoad:
    """Measures the share of the processors that other processes use, from /proc/stat on Linux; 0 elsewhere."""

    def __init__(self) -> None:
        self._before = self._now()

    def share(self) -> float:
        """Return the share since this object was created."""
        (wall, busy, own), (wall_before, busy_before, own_before) = self._now(), self._before
        others = (busy - busy_before) - (own - own_before)
        return max(0.0, others / (wall - wall_before) / (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and iowait
        except OSError:
            busy = time.process_time()
        return time.perf_counter(), busy, time.process_time()


def main() -> None:
    """Run the job from standard input and write the report."""
    job = json.load(sys.stdin)
    open_system, packages = RUNNERS[job["system"]]
    started = time.perf_counter()
    answer = open_system(job)
    loaded = time.perf_counter() - started
    warm_up = answer(job["prompts"][0], job["warm_up_tokens"])
    next(warm_up)
    first = time.perf_counter() - started
    for _ in warm_up:
        pass
    tokens, attempts = job["max_new_tokens"], job["attempts"]
    prompts = [least_disturbed(answer, prompt, tokens, attempts) for prompt in job["prompts"]]
    report = {
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": sys.version.split()[0]},
        "load_seconds": loaded,
        "start_seconds": first,  # from nothing loaded to the first token, libraries included
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        "prompts": prompts,
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
