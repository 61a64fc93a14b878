"""The TensorRT backend: one engine per number of nodes, one execution context and CUDA graph per shape of step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from medusa_runtime import tensorrt_library
from medusa_runtime.backends.base import BackendFacts
from medusa_runtime.backends.cuda import CudaDevice, CudaGraph
from medusa_runtime.backends.device import DeviceTensor
from medusa_runtime.backends.device_backend import DeviceBackend
from medusa_runtime.backends.element_types import kv_type
from medusa_runtime.backends.memory_check import check_device_memory
from medusa_runtime.backends.step_shape import StepShape
from medusa_runtime.backends.token_major_arena import TokenMajorArena
from medusa_runtime.bundle import Bundle
from medusa_runtime.engine_manifest import REMEDY, EngineManifest
from medusa_runtime.errors import BundleError, CapacityError
from medusa_runtime.facts import HeadFacts, ModelFacts

MAX_CHAIN = 32  # nodes of an engine that may verify a chain of literals
PLAIN_ENGINE_NODES = 16  # nodes of the engine for plain decoding, whose steps of one node are padded
PAST_MULTIPLE = 8  # the number of rows of the past that a step binds is a multiple of this
WORKSPACE_BYTES = 256 << 20  # an estimate of the memory that TensorRT needs in addition to weights and KV cache


def round_past_down(rows: int) -> int:
    """Round a number of rows down to a multiple of PAST_MULTIPLE."""
    return rows - rows % PAST_MULTIPLE


def load(
    bundle: Bundle,
    model: ModelFacts,
    name: str,
    precision: str | None,
    threads: int | None,  # noqa: ARG001
    gpu: int,
    map_weights: bool = False,  # noqa: ARG001
) -> TensorRtBackend:
    """Load a bundle's engines for `medusa_runtime.backends.load_backend`; `threads` and `map_weights` are ignored."""
    engines = bundle.engines(name, precision)
    if not engines:
        key = bundle.graph(name, precision)[0].key
        raise BundleError(
            f"{bundle.root} has no engines for {key} yet; build them on the machine that is to run "
            f"them: medusa-export engines {bundle.root}"
        )
    return TensorRtBackend(engines, model, bundle.heads, CudaDevice(gpu), name=name)


class TensorRtBackend(DeviceBackend):
    """Runs TensorRT engines, each of which is loaded when the first step needs it.

    A step is padded to the engine that serves it. The first run of a shape enqueues the engine directly, the second is
    captured as a CUDA graph, and all later runs replay that graph.
    """

    def __init__(
        self,
        engines: Iterable[tuple[EngineManifest, Path]],
        model: ModelFacts,
        heads: HeadFacts,
        device: CudaDevice,
        *,
        name: str = "tensorrt",
    ) -> None:
        """Prepare to load engines.

        Args:
            engines: Description and file of each engine, at least one; all of the same precision.
            model: The model. Its context is reduced to the longest past that the engines were built for.
            heads: The Medusa heads.
            device: The GPU.
            name: "tensorrt" or "tensorrt-rtx".

        Raises:
            CapacityError: The GPU's memory is too small, or the model's context is below what the engines read.
            MissingExtraError: TensorRT is not installed.
        """
        self._trt, self._version = tensorrt_library.import_tensorrt(name)
        self._files = dict(engines)
        first = next(iter(self._files))
        most = min(facts.most for facts in self._files)
        length = min(most, model.context)
        rows = round_past_down(length)
        least = max(facts.least for facts in self._files)
        if rows < least:
            raise CapacityError(
                f"the engines of {name} read a past of {least} rows at least, a max_length of {length} has no "
                "room for them; choose a larger one, or build engines for it: medusa-export engines … --max-length"
            )
        model = replace(model, context=rows)
        super().__init__(name, first.precision, model, heads, device)
        self._new_arena = TokenMajorArena
        sizes = {facts.nodes for facts in self._files if 1 < facts.nodes == facts.rows <= MAX_CHAIN}
        self.literal_counts = tuple(nodes - 1 for nodes in sorted(sizes))
        weight_bytes = max(facts.size for facts in self._files)
        check_device_memory(device, name, model, kv_type(first.precision).itemsize, weight_bytes, WORKSPACE_BYTES)
        self._device: CudaDevice = device
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._logger)
        self._loaded: dict[EngineManifest, _LoadedEngine] = {}

    def facts(self) -> BackendFacts:
        """Describe device and library; the weights are those of the engine for plain decoding."""
        plain = self._engine_for(StepShape(1, 1, 1, draft=False, P=1))
        return self._facts(self.name, self._version, plain.size)

    def _padded_shape(self, shape: StepShape) -> StepShape:
        facts = self._engine_for(shape)
        P = min(max(shape.P, facts.least), facts.most)
        return StepShape(shape.B, facts.nodes, facts.rows, facts.draft, P, summaries=True)  # an engine's S is its R

    def _engine_for(self, shape: StepShape) -> EngineManifest:
        """Choose an engine for a step: the fastest where all that fit were timed, otherwise the smallest.

        An engine with heads also serves a step without a draft; in TensorRT 8.6 it may well be the fastest one.
        """
        fitting = [
            facts
            for facts in self._files
            if facts.batch == shape.B
            and facts.nodes >= shape.T
            and facts.rows >= shape.R
            and (facts.draft or not shape.draft)
        ]
        if not fitting:
            sizes = ", ".join(f"{facts.nodes} ({facts.rows} with logits)" for facts in self._files)
            raise CapacityError(
                f"no engine of {self.name} accepts a step of {shape.B} sequences, {shape.T} nodes, {shape.R} with "
                f"logits; expected a step that fits one of {sizes} nodes: choose another tree, or build an engine for "
                "this one with --profile"
            )
        timed = all(facts.step_ms for facts in fitting)
        return min(
            fitting,
            key=lambda facts: (
                facts.step_ms if timed and facts.step_ms else max(facts.nodes, PLAIN_ENGINE_NODES),
                facts.draft,
                facts.nodes,
                facts.rows,
            ),
        )

    def _new_runner(
        self, shape: StepShape, inputs: dict[str, DeviceTensor], outputs: dict[str, DeviceTensor]
    ) -> _EngineRunner:
        facts = self._engine_for(shape)
        if facts not in self._loaded:
            self._loaded[facts] = self._load(facts)
        engine = self._loaded[facts]
        if unknown := sorted(engine.tensor_names - inputs.keys() - outputs.keys()):
            raise BundleError(
                f"the engine of {facts.nodes} nodes asks for {unknown[0]!r}, which no step of this version has; build "
                "bundle and engines again: medusa-export build … --backend tensorrt"
            )
        context = engine.new_context()
        for name, tensor in (inputs | outputs).items():
            if name in engine.tensor_names and not context.set_tensor_address(name, tensor.address):
                raise BundleError(f"the engine of {facts.nodes} nodes accepts no address for {name}; {REMEDY}")
        for name in engine.tensor_names & inputs.keys():
            if not context.set_input_shape(name, inputs[name].shape):
                raise BundleError(
                    f"the engine of {facts.nodes} nodes does not accept {name} of shape {inputs[name].shape}; {REMEDY}"
                )
        return _EngineRunner(self._device, context)

    def _load(self, facts: EngineManifest) -> _LoadedEngine:
        target = "sm{}{}".format(*self._device.compute_capability)
        data = facts.read(self._files[facts], self.name, self._version, target)
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BundleError(f"{self.name} cannot load {self._files[facts]}; {REMEDY}")
        return _LoadedEngine(self._trt, engine, self._device)

    def _unload(self) -> None:
        for name in ("_loaded", "_runtime"):
            vars(self).pop(name, None)


class _LoadedEngine:
    """An engine, with one scratch memory for all its contexts, of which only one runs at a time."""

    def __init__(self, trt: Any, engine: Any, device: CudaDevice) -> None:
        self._trt, self._engine = trt, engine
        self.tensor_names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        size = getattr(engine, "device_memory_size_v2", None) or engine.device_memory_size
        self._scratch = device.allocate(size)

    def new_context(self) -> Any:
        """Create an execution context that uses the shared scratch memory."""
        if hasattr(self._trt, "ExecutionContextAllocationStrategy"):
            context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            context = self._engine.create_execution_context_without_device_memory()
        context.device_memory = self._scratch.address
        return context


class _EngineRunner:
    """An execution context for steps of one shape, and its CUDA graph once it is captured."""

    def __init__(self, device: CudaDevice, context: Any) -> None:
        self._device, self._context = device, context
        self._has_run = False
        self._graph: CudaGraph | None = None

    def run(self) -> None:
        """Run one step and wait until it is done."""
        if self._graph is not None:
            self._device.launch(self._graph)
        elif self._has_run:
            self._graph = self._device.capture(self._enqueue)
            self._device.launch(self._graph)
        else:
            self._enqueue()
        self._has_run = True
        self._device.synchronize()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._device.stream):
            raise RuntimeError("TensorRT could not enqueue a step")
