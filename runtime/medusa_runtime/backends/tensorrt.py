"""TensorRT on a CUDA GPU: one engine for each number of nodes, one context and CUDA graph for each shape of step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from medusa_runtime import flavour
from medusa_runtime.backends.base import BackendFacts
from medusa_runtime.backends.cuda import CudaDevice
from medusa_runtime.backends.device_backend import DeviceBackend
from medusa_runtime.backends.element_types import element
from medusa_runtime.backends.host_buffers import HostBuffers
from medusa_runtime.backends.kv_arena import Tensor
from medusa_runtime.backends.memory_check import check_device_memory
from medusa_runtime.backends.step_shape import StepShape
from medusa_runtime.backends.token_major_arena import TokenMajorArena
from medusa_runtime.bundle import Bundle
from medusa_runtime.engine_facts import REMEDY, EngineFacts
from medusa_runtime.errors import BundleError, CapacityError
from medusa_runtime.facts import HeadFacts, ModelFacts

PLAIN_ENGINE_NODES = 16  # of the engine that plain decoding runs in, padded
PAST_MULTIPLE = 8  # rows: what the past that a step binds is a multiple of
WORKSPACE_BYTES = 256 << 20  # bytes beside weights and KV rows, about


def round_past_down(rows: int) -> int:
    """Cut a number of rows to a multiple of PAST_MULTIPLE."""
    return rows - rows % PAST_MULTIPLE


def load(
    bundle: Bundle,
    model: ModelFacts,
    name: str,
    precision: str | None,
    threads: int | None,  # noqa: ARG001
    gpu: int,
) -> TensorRtBackend:
    """Make the backend that `medusa_runtime.backends.load_backend` asks for; threads mean nothing to a GPU."""
    engines = bundle.engines(name, precision)
    if not engines:
        key = bundle.graph(name, precision)[0].key
        raise BundleError(
            f"{bundle.root} has no engines for {key} yet; build them where they are to run: "
            f"medusa-export engines {bundle.root}"
        )
    return TensorRtBackend(engines, model, bundle.heads, CudaDevice(gpu), name=name)


class TensorRtBackend(DeviceBackend):
    """Runs engines, each loaded when the first step needs it.

    A step runs in the smallest engine that has room for its nodes, padded; the first run of a shape is a plain one, the
    second is captured as a CUDA graph, all others replay that.
    """

    def __init__(
        self,
        engines: Iterable[tuple[EngineFacts, Path]],
        model: ModelFacts,
        heads: HeadFacts,
        device: CudaDevice,
        *,
        name: str = "tensorrt",
    ) -> None:
        """Take engines of one precision, one at least. Raises CapacityError where they do not fit."""
        self._trt, self._version = flavour.load(name)
        self._files = dict(engines)
        first = next(iter(self._files))
        most = min(facts.most for facts in self._files)
        length = min(most, model.context)  # what was built for is all there is
        rows = round_past_down(length)
        least = max(facts.least for facts in self._files)
        if rows < least:
            raise CapacityError(
                f"the engines of {name} read a past of {least} rows at least, a max_length of {length} has no "
                "room for them; give a larger one, or build for it: medusa-export engines … --max-length"
            )
        model = replace(model, context=rows)
        super().__init__(name, first.precision, model, heads, device)
        self._new_arena = TokenMajorArena
        weights = max(facts.size for facts in self._files)
        check_device_memory(device, name, model, element(first.precision).size, weights, WORKSPACE_BYTES)
        self._device: CudaDevice = device
        self._log = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._log)
        self._loaded: dict[EngineFacts, _Engine] = {}

    def facts(self) -> BackendFacts:
        """Describe device and library; the weights are those of the engine that decodes plainly."""
        plain = self._facts(StepShape(1, 1, 1, draft=False, P=1))
        return self._described(self.name, self._version, plain.size)

    def _served(self, shape: StepShape) -> StepShape:
        facts = self._facts(shape)
        return StepShape(shape.B, facts.nodes, facts.rows, facts.draft, min(max(shape.P, facts.least), facts.most))

    def _facts(self, shape: StepShape) -> EngineFacts:
        """The engine that serves fastest, where those that do were timed, or else the smallest.

        One with heads serves a step without a draft too, and in TensorRT 8.6 may well be the fastest to do so.
        """
        serving = [
            facts
            for facts in self._files
            if facts.batch == shape.B
            and facts.nodes >= shape.T
            and facts.rows >= shape.R
            and (facts.draft or not shape.draft)
        ]
        if not serving:
            sizes = ", ".join(f"{facts.nodes} ({facts.rows} with logits)" for facts in self._files)
            raise CapacityError(
                f"no engine of {self.name} takes a step of {shape.B} sequences, {shape.T} nodes, {shape.R} with "
                f"logits; there are those of {sizes} nodes: take another tree, or build with --profile for this one"
            )
        timed = all(facts.step_ms for facts in serving)
        return min(
            serving,
            key=lambda facts: (
                facts.step_ms if timed and facts.step_ms else max(facts.nodes, PLAIN_ENGINE_NODES),
                facts.draft,
                facts.nodes,
                facts.rows,
            ),
        )

    def _new_binding(
        self, shape: StepShape, memory: HostBuffers, given: dict[str, Tensor], made: dict[str, Tensor]
    ) -> _Binding:
        facts = self._facts(shape)
        if facts not in self._loaded:
            self._loaded[facts] = self._load(facts)
        if unknown := sorted(self._loaded[facts].names - given.keys() - made.keys()):
            raise BundleError(
                f"the engine of {facts.nodes} nodes asks for {unknown[0]!r}, which no step of this version has; make "
                "bundle and engines again: medusa-export build … --backend tensorrt"
            )
        context = self._loaded[facts].context()
        for name, tensor in (given | made).items():
            if name in self._loaded[facts].names and not context.set_tensor_address(name, tensor.address):
                raise BundleError(f"the engine of {facts.nodes} nodes takes no address for {name}; {REMEDY}")
        for name in self._loaded[facts].names & given.keys():
            if not context.set_input_shape(name, given[name].shape):
                raise BundleError(f"the engine of {facts.nodes} nodes takes no {name} of {given[name].shape}; {REMEDY}")
        return _Binding(self._device, context, shape, memory)

    def _load(self, facts: EngineFacts) -> _Engine:
        target = "sm{}{}".format(*self._device.compute_capability)
        data = facts.read(self._files[facts], self.name, self._version, target)
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BundleError(f"{self.name} cannot load {self._files[facts]}; {REMEDY}")
        return _Engine(self._trt, engine, self._device)

    def _unload(self) -> None:
        for name in ("_loaded", "_runtime"):
            vars(self).pop(name, None)


class _Engine:
    """One engine, and the scratch memory that all its contexts share: they run one after the other."""

    def __init__(self, trt: Any, engine: Any, device: CudaDevice) -> None:
        self._trt, self._engine = trt, engine
        self.names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        size = getattr(engine, "device_memory_size_v2", None) or engine.device_memory_size
        self._scratch = device.allocate(size)

    def context(self) -> Any:
        if hasattr(self._trt, "ExecutionContextAllocationStrategy"):
            context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            context = self._engine.create_execution_context_without_device_memory()
        context.device_memory = self._scratch.address
        return context


class _Binding:
    """One context for steps of one shape."""

    def __init__(self, device: CudaDevice, context: Any, shape: StepShape, memory: HostBuffers) -> None:
        self.shape, self.memory = shape, memory
        self._device, self._context = device, context
        self._runs = 0
        self._graph: Any = None

    def run(self) -> None:
        """Run and wait."""
        if self._graph is not None:
            self._device.launch(self._graph)
        elif self._runs:
            self._graph = self._device.capture(self._enqueue)
            self._device.launch(self._graph)
        else:
            self._enqueue()
        self._runs += 1
        self._device.synchronize()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._device.stream):
            raise RuntimeError("TensorRT could not enqueue a step")
