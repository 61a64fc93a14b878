"""Opens the systems that peers.py compares, each in the Python environment that has its packages.

A job is a JSON object: `system` is a key of RUNNERS, `model` is a path, `threads` and `context` (tokens of the longest
sequence) are numbers; `ngram` is null for plain decoding, or {"size", "draft"}: speculation with what followed the last
`size` tokens earlier in the text, `draft` tokens at most. `options` go to the system as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Job = dict[str, Any]
Report = Callable[[list[int]], None]
# Decodes a number of tokens greedily after a prompt. It reports the token of the prefill, then the tokens of each step,
# as soon as they are known; end tokens do not stop it.
Answer = Callable[[list[int], int, Report], None]


def open_medusa(job: Job) -> Answer:
    """Open this project's decoder with `tree` (a name, or the path of a .toml file) or, if that is null, without.

    Weights stay mapped where they are not repacked, as llama.cpp's and OpenVINO's do.
    """
    from medusa_profiles.catalogue import profile_from_file
    from medusa_profiles.profile import TreeProfile
    from medusa_runtime.backends import load_backend
    from medusa_runtime.bundle import Bundle
    from medusa_runtime.decoder import Decoder

    bundle, tree = Bundle.open(job["model"]), job["tree"]
    profile = TreeProfile.plain() if tree is None else profile_from_file(tree) or bundle.profile(tree)
    decoder = Decoder(load_backend(bundle, "ort-cpu", job["precision"], job["threads"], map_weights=True), profile)

    def answer(prompt: list[int], tokens: int, report: Report) -> None:
        report(decoder.start(prompt, tokens, stop_ids=()))
        while decoder.sequence is not None and decoder.sequence.finish_reason is None:
            report(decoder.step())

    return answer


def open_genai(job: Job) -> Answer:
    """Open onnxruntime-genai with a folder from its builder.

    Without `intra_op_num_threads`, it uses one thread. It hands out the tokens of a speculative step one by one.
    """
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(job["model"])
    session = {"intra_op_num_threads": job["threads"]} | job["options"]
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model, ngram = og.Model(config), job["ngram"]

    def answer(prompt: list[int], tokens: int, report: Report) -> None:
        parameters = og.GeneratorParams(model)
        length = len(prompt) + tokens
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        if ngram:
            parameters.set_speculative_options(ngram_size=ngram["size"], max_draft_tokens=ngram["draft"])
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.asarray([prompt], dtype=np.int32))  # runs the prefill
        while not generator.is_done():
            generator.generate_next_token()  # the first call only samples from the prefill's logits
            report([int(token) for token in generator.get_next_tokens()])

    return answer


def open_llama(job: Job) -> Answer:
    """Open llama.cpp with a .gguf file, through its C interface.

    Speculation is what its server calls ngram-simple (`ngram_draft`). The loop is ours, since the one of
    llama-cpp-python copies the logits of the whole context.
    """
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(job["model"].encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = job["context"]
    settings.n_threads = settings.n_threads_batch = job["threads"]
    for name, value in job["options"].items():
        setattr(settings, name, value)
    context = llama_cpp.llama_init_from_model(model, settings)
    if not model or not context:
        raise RuntimeError(f"llama.cpp could not load {job['model']}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    cache, batch = llama_cpp.llama_get_memory(context), llama_cpp.llama_batch_init(job["context"], 0, 1)
    ngram = job["ngram"]

    def decode(tokens: list[int], past: int, rows: int) -> list[int]:
        """Return the argmax of the logits of the last `rows` tokens."""
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, past + at, 1, 0
            batch.logits[at] = at >= len(tokens) - rows
        batch.n_tokens = len(tokens)
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code} for {len(tokens)} tokens behind {past}")
        logits = (llama_cpp.llama_get_logits_ith(context, row - rows) for row in range(rows))
        return [int(np.ctypeslib.as_array(row, shape=(vocabulary,)).argmax()) for row in logits]

    def answer(prompt: list[int], tokens: int, report: Report) -> None:
        llama_cpp.llama_memory_clear(cache, False)
        text, end = list(prompt), len(prompt) + tokens
        added = decode(prompt, 0, 1)
        while True:
            text += added
            report(added)
            if len(text) == end:
                return
            drafts = ngram_draft(text, ngram["size"], min(ngram["draft"], end - len(text) - 1)) if ngram else []
            added = accepted(drafts, decode([text[-1], *drafts], len(text) - 1, 1 + len(drafts)))
            if drafts:
                llama_cpp.llama_memory_seq_rm(cache, 0, len(text) - 1 + len(added), -1)

    return answer


def ngram_draft(text: list[int], size: int, tokens: int) -> list[int]:
    """Return at most `tokens` tokens that followed the last earlier occurrence of the last `size` tokens of a text."""
    ending = text[-size:]
    for at in range(len(text) - size - 1, -1, -1):
        if text[at : at + size] == ending:
            return text[at + size : at + size + tokens]
    return []


def accepted(drafts: list[int], chosen: list[int]) -> list[int]:
    """Return the drafts that equal the decoder's choices before them, and the choice behind the last of these.

    Args:
        drafts: n drafted tokens.
        chosen: n + 1 tokens: the decoder's choice after the root and after each draft.
    """
    equal = next((at for at, draft in enumerate(drafts) if draft != chosen[at]), len(drafts))
    return chosen[: equal + 1]


def open_openvino(job: Job) -> Answer:
    """Open OpenVINO GenAI with a folder from optimum-intel, on its default attention backend.

    Its prefix cache is switched off: it would skip the prefill of a prompt that has been answered before.
    """
    import numpy as np
    import openvino
    import openvino_genai as og

    ngram = job["ngram"]
    scheduler = og.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    options = {"INFERENCE_NUM_THREADS": job["threads"], "scheduler_config": scheduler} | job["options"]
    pipeline = og.LLMPipeline(job["model"], "CPU", **options, **({"prompt_lookup": True} if ngram else {}))
    config = og.GenerationConfig()
    config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
    if ngram:
        config.max_ngram_size, config.num_assistant_tokens = ngram["size"], ngram["draft"]

    class Streamer(og.StreamerBase):  # type: ignore[misc]
        def __init__(self, report: Report) -> None:
            super().__init__()
            self.report = report

        def write(self, token: int | list[int]) -> og.StreamingStatus:
            self.report(token if isinstance(token, list) else [token])
            return og.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def answer(prompt: list[int], tokens: int, report: Report) -> None:
        ids = np.asarray([prompt], dtype=np.int64)
        config.max_new_tokens = tokens
        inputs = og.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        pipeline.generate(inputs, config, Streamer(report))

    return answer


RUNNERS: dict[str, tuple[Callable[[Job], Answer], tuple[str, ...]]] = {
    "medusa": (open_medusa, ("medusa-export", "onnxruntime", "numpy")),
    "genai": (open_genai, ("onnxruntime-genai", "onnxruntime", "numpy")),
    "llama.cpp": (open_llama, ("llama-cpp-python", "numpy")),
    "openvino": (open_openvino, ("openvino-genai", "openvino", "numpy")),
}
