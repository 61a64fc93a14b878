"""Real GPUs: ONNX Runtime's CUDA provider decodes what the CPU does, plain and through CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends import load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder

pytestmark = pytest.mark.gpu
PROMPT = [5, 9, 17, 3, 44, 23]


def answer(decoder: Decoder) -> list[int]:
    decoder.start(PROMPT, 300, stop_ids=())  # past 256 rows, where a longer past is bound
    assert decoder.sequence is not None
    while decoder.sequence.finish is None:
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
