"""Real GPUs: ONNX Runtime's CUDA provider decodes what the CPU does, plain and through CUDA graphs."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends import load_backend
from medusa_runtime.backends.base import literal_step
from medusa_runtime.backends.cuda import CudaDevice
from medusa_runtime.backends.ort_cuda import load_on_device
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import MedusaError, WrongThreadError
from medusa_runtime.prefix_reuse import PrefixReuse

from ..interrupting import elsewhere

pytestmark = pytest.mark.gpu
PROMPT = [5, 9, 17, 3, 44, 23]


def answer(decoder: Decoder) -> list[int]:
    decoder.start(PROMPT, 300, stop_ids=())  # past 256 rows, where a longer past is bound
    assert decoder.sequence is not None
    while decoder.sequence.finish_reason is None:
        decoder.step()
    return decoder.sequence.answer


@pytest.mark.parametrize("name", ["plain", "tree-4", "tree-64"])
def test_cuda_decodes_what_the_cpu_does(tiny_backends: Path, name: str) -> None:
    bundle = Bundle.open(tiny_backends)
    tree = TreeProfile.plain() if name == "plain" else bundle.profile(name)
    expected = answer(Decoder(load_backend(bundle, "ort-cpu", "fp32"), tree))
    decoder = Decoder(load_backend(bundle, "ort-cuda", "fp32"), tree)
    assert answer(decoder) == expected
    assert answer(decoder) == expected  # every step a replay now


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_cuda_in_16_bits_answers_the_same_again(tiny_backends: Path, precision: str) -> None:
    bundle = Bundle.open(tiny_backends)
    decoder = Decoder(load_backend(bundle, "ort-cuda", precision), bundle.profile("tree-8"))
    assert answer(decoder) == answer(decoder)


def test_a_second_thread_is_refused_and_costs_no_memory(tiny_backends: Path) -> None:
    bundle = Bundle.open(tiny_backends)
    decoder = Decoder(load_backend(bundle, "ort-cuda", "fp16"), bundle.profile("tree-8"))
    expected, device = list(answer(decoder)), CudaDevice()
    answer(decoder)  # all that there is to capture has been
    free = device.free_bytes()
    for _ in range(3):
        refused = elsewhere(lambda: answer(decoder))
        assert isinstance(refused, WrongThreadError) and "which ran the first" in str(refused)
    assert device.free_bytes() >= free - (16 << 20)
    assert answer(decoder) == expected


def test_warming_up_in_another_thread_binds_the_backend_to_it(tiny_backends: Path) -> None:
    bundle = Bundle.open(tiny_backends)
    decoder = Decoder(load_backend(bundle, "ort-cuda", "fp16"), bundle.profile("tree-8"))
    assert elsewhere(decoder.warm_up) is None
    with pytest.raises(WrongThreadError):
        answer(decoder)


def test_a_gpu_is_chosen_by_its_number(tiny_backends: Path) -> None:
    bundle = Bundle.open(tiny_backends)
    expected = answer(Decoder(load_backend(bundle, "ort-cpu", "fp32"), bundle.profile("tree-8")))
    assert answer(Decoder(load_backend(bundle, "ort-cuda", "fp32", gpu=0), bundle.profile("tree-8"))) == expected
    with pytest.raises(MedusaError, match=r"there is no GPU 99: this process sees [1-9]\d*, expected a number"):
        load_backend(bundle, "ort-cuda", "fp32", gpu=99)


def test_the_last_gpu_decodes_what_the_first_does(tiny_backends: Path) -> None:
    """With one GPU they are the same; with several this is the one where a forgotten number shows."""
    bundle = Bundle.open(tiny_backends)
    last = CudaDevice().count - 1
    for precision in ("fp32", "fp16"):
        first = Decoder(load_backend(bundle, "ort-cuda", precision, gpu=0), bundle.profile("tree-8"))
        other = Decoder(load_backend(bundle, "ort-cuda", precision, gpu=last), bundle.profile("tree-8"))
        expected = list(answer(first))
        assert answer(other) == expected
        assert answer(first) == expected  # after the other GPU was this thread's


def test_backends_that_are_gone_give_their_memory_back(tiny_backends: Path) -> None:
    bundle, device = Bundle.open(tiny_backends), CudaDevice()

    def load_and_answer() -> None:
        decoder = Decoder(load_backend(bundle, "ort-cuda", "fp16"), bundle.profile("tree-64"))
        answer(decoder)

    load_and_answer()  # what CUDA and the library keep for the process is there after the first
    gc.collect()
    free = device.free_bytes()
    for _ in range(20):
        load_and_answer()
        gc.collect()
    assert device.free_bytes() >= free - (64 << 20)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_first_tree_step_takes_no_second_kv_cache(tiny_backends: Path, precision: str) -> None:
    """Of a context so long that the keys and values show among all else that is allocated."""
    bundle, device = Bundle.open(tiny_backends), CudaDevice()
    model = replace(bundle.model, context=1 << 20)
    cache = model.context * model.kv_bytes_per_token(4 if precision == "fp32" else 2)
    before = device.free_bytes()
    decoder = Decoder(load_on_device(device, bundle, model, "ort-cuda", precision))
    decoder.start(PROMPT, 40, stop_ids=())
    decoder.step()
    plain = device.free_bytes()
    assert before - plain >= cache
    decoder.set_profile(bundle.profile("tree-64"))
    decoder.step()
    decoder.step()
    assert plain - device.free_bytes() < cache // 2


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_copies_of_a_past_bring_the_same_bits_back(tiny_backends: Path, precision: str) -> None:
    bundle = Bundle.open(tiny_backends)
    decoder = Decoder(load_backend(bundle, "ort-cuda", precision), bundle.profile("tree-8"))
    expected = list(answer(decoder))
    backend, rows = decoder.backend, len(PROMPT) + 280
    step = literal_step(np.array([7], np.int32), rows, np.array([0], np.int32))
    backend.run(step)
    before = backend.read_logits(0).copy()
    saved = decoder.cache.save(rows)
    decoder.start([8, *PROMPT], 300, stop_ids=())
    while decoder.sequence is not None and decoder.sequence.finish_reason is None:
        decoder.step()  # other rows
    decoder.cache.restore(saved, rows)
    backend.run(step)
    np.testing.assert_array_equal(backend.read_logits(0), before)
    assert list(answer(decoder)) == expected


@pytest.mark.parametrize("name", ["plain", "tree-8"])
def test_prefixes_are_reused_on_a_gpu_in_fp32(tiny_backends: Path, name: str) -> None:
    bundle = Bundle.open(tiny_backends)
    tree = TreeProfile.plain() if name == "plain" else bundle.profile(name)

    def answers(budget: int) -> tuple[list[list[int]], int]:
        decoder = Decoder(load_backend(bundle, "ort-cuda", "fp32"), tree)
        decoder.reuse = PrefixReuse(decoder.cache, budget)
        found, chats = list[list[int]](), {seed: [seed, *PROMPT] for seed in (8, 9, 10)}
        reused = 0
        for _ in range(3):
            for seed, chat in chats.items():
                decoder.start(chat, 60, stop_ids=())
                sequence = decoder.sequence
                assert sequence is not None
                while sequence.finish_reason is None:
                    decoder.step()
                found.append(list(sequence.answer))
                reused += sequence.reused
                chats[seed] = [*chat, *sequence.answer, *PROMPT]
        return found, reused

    expected, none = answers(0)
    for budget in (1 << 30, 100 * bundle.model.kv_bytes_per_token(4)):
        found, reused = answers(budget)
        assert found == expected and reused > 0 == none


def test_dropped_copies_give_their_memory_back(tiny_backends: Path) -> None:
    bundle, device = Bundle.open(tiny_backends), CudaDevice()
    decoder = Decoder(load_backend(bundle, "ort-cuda", "fp16"), bundle.profile("tree-8"))
    answer(decoder)
    rows = decoder.cache.length()
    decoder.cache.save(rows)
    free = device.free_bytes()
    for _ in range(200):
        decoder.cache.save(rows)
    assert device.free_bytes() >= free - (16 << 20)
