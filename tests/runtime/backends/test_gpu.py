"""Real GPUs: ONNX Runtime's CUDA provider decodes what the CPU does, plain and through CUDA graphs."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends import load_backend
from medusa_runtime.backends.cuda import CudaDevice
from medusa_runtime.backends.ort_cuda import load_on_device
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import MedusaError, WrongThreadError

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
