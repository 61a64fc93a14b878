"""Running bound steps: the binding cache, runs and commits that were interrupted, results of completed runs."""

from __future__ import annotations

import numpy as np
import pytest
from medusa_runtime.backends import binding_cache
from medusa_runtime.backends.base import Step, literal_step
from medusa_runtime.backends.batch_memory import BatchMemory
from medusa_runtime.backends.binding_cache import BindingCache
from medusa_runtime.backends.element_types import FLOAT32
from medusa_runtime.backends.host_buffers import HostBuffers
from medusa_runtime.backends.layer_major_arena import LayerMajorArena
from medusa_runtime.backends.step_binding import StepBinding
from medusa_runtime.backends.step_executor import StepExecutor
from medusa_runtime.backends.step_shape import StepShape
from medusa_runtime.errors import BackendError
from medusa_runtime.facts import ModelFacts

from .host_device import HostDevice

MODEL = ModelFacts("m", "llama", 2, 8, 2, 1, 4, 16, 64, ())
HIDDEN_SIZE = 8


class Waiting(HostDevice):
    """Counts how often the host waits for the device; a copy can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        self.failure: BaseException | None = None

    def synchronize(self) -> None:
        self.waits += 1

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        if self.failure is not None:
            raise self.failure
        super().copy_rows(to, to_pitch, source, source_pitch, width, height)


class Runner:
    failure: BaseException | None = None

    def run(self) -> None:
        if self.failure is not None:
            raise self.failure


def new_memory(device: HostDevice, nodes: int = 4) -> BatchMemory:
    return BatchMemory.allocate(device, LayerMajorArena, MODEL, FLOAT32, HIDDEN_SIZE, 1, 64, nodes)


def new_binding(memory: BatchMemory, nodes: int = 3) -> StepBinding:
    shape = StepShape(1, nodes, 1, draft=False, P=64, causal=True)
    return StepBinding(Runner(), shape, HostBuffers(memory.device, shape, 8), memory)


def new_step(nodes: int = 3) -> Step:
    return literal_step(np.arange(nodes, dtype=np.int32), 5, np.array([nodes - 1], np.int32))


def test_the_cache_drops_the_binding_that_was_used_least_recently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding_cache, "MAX_BINDINGS", 2)
    cache = BindingCache(new_memory(HostDevice()))
    one, two, three = (new_binding(cache.memory, nodes) for nodes in (1, 2, 3))
    cache.add(one)
    cache.add(two)
    assert cache.get(one.shape) is one
    cache.add(three)
    assert cache.shapes == (one.shape, three.shape)
    assert cache.get(two.shape) is None


def test_bindings_stay_with_their_arena() -> None:
    memory = new_memory(HostDevice())
    cache, binding = BindingCache(memory), new_binding(memory)
    cache.add(binding)
    larger_outputs = memory.fitted_to(binding.shape._replace(R=3))
    assert larger_outputs.arena is memory.arena and larger_outputs.outputs.max_rows == 3
    assert cache.with_memory(larger_outputs).get(binding.shape) is binding
    larger_arena = memory.fitted_to(binding.shape._replace(T=9))
    assert cache.with_memory(larger_arena).get(binding.shape) is None
    assert memory.fitted_to(binding.shape) is memory


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("broken")])
def test_after_an_interrupted_run_the_next_one_waits_for_the_device(failure: BaseException) -> None:
    device, runner = Waiting(), Runner()
    executor, memory = StepExecutor("toy", "fp32", device), new_memory(device)
    shape = StepShape(1, 3, 1, draft=False, P=64, causal=True)
    binding = StepBinding(runner, shape, HostBuffers(device, shape, 8), memory)
    executor.run(binding, new_step())
    assert device.waits == 0
    runner.failure = failure
    with pytest.raises(BackendError if isinstance(failure, RuntimeError) else KeyboardInterrupt):
        executor.run(binding, new_step())
    runner.failure = None
    executor.run(binding, new_step())
    executor.run(binding, new_step())
    assert device.waits == 1


def test_an_interrupted_commit_is_not_repeated() -> None:
    device = Waiting()
    executor, memory = StepExecutor("toy", "fp32", device), new_memory(device)
    completed = executor.run(new_binding(memory), new_step())
    device.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        completed.commit(0, [0, 2], 5)
    device.failure = None
    with pytest.raises(RuntimeError, match="an earlier commit of this step was finished or interrupted"):
        completed.commit(0, [0, 2], 5)
    executor.run(new_binding(memory), new_step()).commit(0, [0, 2], 5)


def test_a_commit_is_not_repeated() -> None:
    device = HostDevice()
    executor, memory = StepExecutor("toy", "fp32", device), new_memory(device)
    completed = executor.run(new_binding(memory), new_step())
    completed.commit(0, [0, 2], 5)
    with pytest.raises(RuntimeError, match="an earlier commit of this step was finished or interrupted"):
        completed.commit(0, [0, 1], 5)


def test_what_a_step_does_not_have_is_refused_instead_of_read_from_other_memory() -> None:
    device = HostDevice()
    completed = StepExecutor("toy", "fp32", device).run(new_binding(new_memory(device)), new_step())
    sequences, rows = 1, len(completed.read_argmax(0))
    for row, sequence in ((rows, 0), (-1, 0), (0, sequences), (0, -1)):
        with pytest.raises(IndexError, match="does not exist; expected one from 0 to"):
            completed.read_logits(row, sequence)
    for sequence, node in ((sequences, 0), (-1, 0), (0, len(completed.read_tokens(0)))):
        with pytest.raises(IndexError, match="does not exist; expected one from 0 to"):
            completed.commit(sequence, [node], 5)


def test_results_are_read_from_the_memory_that_the_run_was_bound_to() -> None:
    device = HostDevice()
    memory = new_memory(device)
    completed = StepExecutor("toy", "fp32", device).run(new_binding(memory), new_step())
    logits = np.arange(MODEL.vocab_size, dtype=np.float32)
    device.write(memory.outputs.logits.address, logits)
    memory.fitted_to(StepShape(1, 3, 9, draft=False, P=64))  # larger outputs, of which the run knows nothing
    np.testing.assert_array_equal(completed.read_logits(0, 0), logits)
    assert completed.read_outputs()["new_key_1"].shape == (1, 3, MODEL.kv_row)
