"""Two sequences in one step, on engines for a batch of two, compared with each sequence alone on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medusa_exporter.build import build
from medusa_runtime.backends import Backend, load_backend
from medusa_runtime.backends.base import Step, literal_step
from medusa_runtime.backends.tensorrt import PLAIN_ENGINE_NODES
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import CapacityError
from medusa_runtime.kv_cache import KvCache

from .test_tensorrt import backend, played

__all__ = ["played"]  # a fixture: TensorRT is a fake that runs on ONNX Runtime
PROMPTS = ([5, 9, 17, 3, 44, 23], [12, 7, 99])


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("batch") / "bundle"
    build(
        str(tiny_model),
        str(tiny_heads),
        folder,
        backends=("ort-cpu", "tensorrt"),
        precisions=("fp32",),
        profiles=("tree-4",),
        batch=2,
    )
    return Bundle.open(folder)


def tree_step(bundle: Bundle, roots: list[int], lengths: list[int]) -> Step:
    tree, B = bundle.profile("tree-4"), len(roots)
    ids = np.repeat(tree.candidate_ids(bundle.heads.top_k)[None], B, axis=0)
    ids[:, 0] = roots
    return Step(
        input_ids=ids,
        position_ids=np.array(lengths, np.int32)[:, None] + tree.depths,
        tree_mask=np.repeat(tree.mask[None], B, axis=0),
        past_length=np.array(lengths, np.int32),
        logit_rows=np.repeat(np.arange(tree.size, dtype=np.int32)[None], B, axis=0),
        draft=True,
    )


def alone(running: Backend, bundle: Bundle, prompt: list[int]) -> list[list[int]]:
    """The next token of a prompt, then the tokens and argmax of two tree steps."""
    cache = KvCache(running)
    running.run(literal_step(np.array(prompt, np.int32), 0, np.array([len(prompt) - 1], np.int32)))
    found = [running.read_argmax()]
    cache.commit(range(len(prompt)))
    for path in ([0, 2], [0]):
        cache.reserve(cache.length() + 4)
        running.run(tree_step(bundle, [found[-1][0]], [cache.length()]))
        found += [running.read_tokens(), running.read_argmax()]
        cache.commit(path)
    return found


def together(running: Backend, bundle: Bundle) -> list[list[list[int]]]:
    """The same for both prompts in one batch; both commit the same nodes."""
    cache, longest = KvCache(running, batch=2), max(map(len, PROMPTS))
    ids = np.zeros((2, longest), np.int32)
    for sequence, prompt in enumerate(PROMPTS):
        ids[sequence, : len(prompt)] = prompt  # padded on the right
    step = literal_step(ids[0], 0, np.zeros(1, np.int32))
    running.run(
        Step(
            input_ids=ids,
            position_ids=np.repeat(step.position_ids, 2, axis=0),
            tree_mask=np.repeat(step.tree_mask, 2, axis=0),
            past_length=np.zeros(2, np.int32),
            logit_rows=np.array([[len(prompt) - 1] for prompt in PROMPTS], np.int32),
            draft=False,
        )
    )
    found = [[running.read_argmax(sequence)] for sequence in range(2)]
    for sequence, prompt in enumerate(PROMPTS):
        cache.commit(range(len(prompt)), sequence)
    for path in ([0, 2], [0]):
        lengths = [cache.length(sequence) for sequence in range(2)]
        running.run(tree_step(bundle, [one[-1][0] for one in found], lengths))
        for sequence in range(2):
            found[sequence] += [running.read_tokens(sequence), running.read_argmax(sequence)]
            cache.commit(path, sequence)
    return found


def of_two(bundle: Bundle, folder: Path) -> Backend:
    steps: dict[str, tuple[Any, ...]] = {
        "plain-b2": (PLAIN_ENGINE_NODES, 1, False),
        "prefill-b2": (256, 1, False),
        "t4-b2": (4, 4, True),
    }
    return backend(bundle, folder, steps, batch=2)


def test_each_sequence_of_a_batch_decodes_what_it_decodes_alone(bundle: Bundle, tmp_path: Path) -> None:
    assert together(of_two(bundle, tmp_path), bundle) == [
        alone(load_backend(bundle, "ort-cpu"), bundle, prompt) for prompt in PROMPTS
    ]


def test_a_single_sequence_is_refused_by_engines_for_two(bundle: Bundle, tmp_path: Path) -> None:
    running = of_two(bundle, tmp_path)
    KvCache(running)
    with pytest.raises(CapacityError, match="accepts a step of 1 sequences"):
        running.run(literal_step(np.array([4], np.int32), 0, np.zeros(1, np.int32)))
