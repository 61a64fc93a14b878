"""ONNX Runtime on a CUDA GPU: all but a step's small arrays stays in its memory, one CUDA graph for each shape."""

from __future__ import annotations

from typing import Any

from medusa_runtime import contract
from medusa_runtime.backends.base import MAX_PREFILL_CHUNK, BackendFacts
from medusa_runtime.backends.checked_graph import CheckedGraph
from medusa_runtime.backends.device import Device
from medusa_runtime.backends.device_backend import DeviceBackend
from medusa_runtime.backends.element_types import element
from medusa_runtime.backends.host_buffers import HostBuffers
from medusa_runtime.backends.in_place_arena import InPlaceArena
from medusa_runtime.backends.kv_arena import Tensor
from medusa_runtime.backends.memory_check import check_device_memory
from medusa_runtime.backends.ort_library import import_onnxruntime
from medusa_runtime.backends.ort_session import open_session
from medusa_runtime.backends.shared_weights import SharedWeights
from medusa_runtime.backends.step_shape import StepShape
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError, MissingExtraError
from medusa_runtime.facts import HeadFacts, ModelFacts
from medusa_runtime.sizes import doubled

# Nodes that a tree in 16 bits is padded to, if it has fewer: attention of few rows under a mask takes slower kernels.
MIN_TREE_NODES = 8
WORKSPACE_BYTES = 512 << 20  # bytes that ONNX Runtime takes for itself, about
NO_CUDA_GRAPH = "-1"  # ONNX Runtime's word for a run that is neither captured nor replayed


def causal_graph_name(graph: str) -> str:
    """Name the file of the graph for tokens in a row that may lie beside another."""
    return f"{graph.removesuffix('.onnx')}-causal.onnx"


def load(
    bundle: Bundle,
    model: ModelFacts,
    name: str,
    precision: str | None,
    threads: int | None,  # noqa: ARG001
    gpu: int,
) -> OrtCudaBackend:
    """Make the backend that `medusa_runtime.backends.load_backend` asks for; threads mean nothing to a GPU."""
    from medusa_runtime.backends.cuda import CudaDevice

    return load_on_device(CudaDevice(gpu), bundle, model, name, precision)


def load_on_device(
    device: Device, bundle: Bundle, model: ModelFacts, name: str, precision: str | None
) -> OrtCudaBackend:
    """Make it for a device: a bundle's graph of that name, and the one beside it if there is one."""
    facts, path = bundle.graph(name, precision)
    beside = causal_graph_name(facts.file)
    causal = CheckedGraph(bundle.root / beside, bundle) if beside in bundle.manifest.files else None
    graph = CheckedGraph(path, bundle)
    return OrtCudaBackend(graph, model, bundle.heads, device, facts.precision, name=name, causal=causal)


class OrtCudaBackend(DeviceBackend):
    """Runs a graph with the CUDA provider, and for tokens in a row another one beside it, over the same weights.

    The first run of a shape is a plain one, the second is captured as a CUDA graph, all others replay that. ONNX
    Runtime keeps these graphs and their memory for each thread, so all steps run in the thread that ran the first one.
    """

    in_one_thread = True

    def __init__(
        self,
        graph: CheckedGraph,
        model: ModelFacts,
        heads: HeadFacts,
        device: Device,
        precision: str,
        *,
        name: str = "ort-cuda",
        causal: CheckedGraph | None = None,
    ) -> None:
        """Load the graphs. Raises CapacityError, before anything is loaded, where the weights do not fit."""
        super().__init__(name, precision, model, heads, device)
        self._weights = graph.weight_bytes
        check_device_memory(device, name, model, element(precision).size, self._weights, WORKSPACE_BYTES)
        shared = None if causal is None else SharedWeights([graph, causal], device)
        self._session = _Session(graph, device, shared)
        self._causal = None if causal is None else _Session(causal, device, shared)
        if causal is not None:
            self.prefill_chunk = MAX_PREFILL_CHUNK
        self._in_place = contract.PAST_ROWS in self._session.inputs
        if self._in_place:
            self._new_arena = InPlaceArena
        self._graphs = 0

    def facts(self) -> BackendFacts:
        """Describe device and library."""
        return self._described("onnxruntime", import_onnxruntime("gpu").__version__, self._weights)

    def _served(self, shape: StepShape) -> StepShape:
        """Pad to the next power of two, so that all lengths of prompts are of few shapes; small trees too."""
        causal = shape.causal and self._causal is not None
        nodes = doubled(MIN_TREE_NODES if self._in_place and not causal else 1, shape.T)
        return shape._replace(T=nodes, R=nodes if shape.draft else shape.R, causal=causal)

    def _new_binding(
        self, shape: StepShape, memory: HostBuffers, given: dict[str, Tensor], made: dict[str, Tensor]
    ) -> _Binding:
        session = self._causal if shape.causal and self._causal else self._session
        io = session.library.io_binding()
        if unknown := sorted(session.inputs - given.keys()):
            raise BundleError(f"a graph of {self.name} asks for {unknown[0]!r}, which no step has; build it again")
        for bind, tensors in ((io.bind_input, {one: given[one] for one in session.inputs}), (io.bind_output, made)):
            for name, tensor in tensors.items():
                bind(name, self._device.kind, self._device.index, tensor.number, tensor.shape, tensor.address)
        self._graphs += 1  # never used again: a graph holds the addresses of its first run
        return _Binding(session.library, io, shape, memory, str(self._graphs))

    def _unload(self) -> None:
        for name in ("_session", "_causal"):
            vars(self).pop(name, None)


class _Binding:
    """The session's inputs and outputs for steps of one shape. graph: the id of its CUDA graph."""

    def __init__(self, session: Any, io: Any, shape: StepShape, memory: HostBuffers, graph: str) -> None:
        self.shape, self.memory = shape, memory
        self._io, self._run = io, session.run_with_iobinding
        self._options = [_run_options(NO_CUDA_GRAPH), _run_options(graph)]  # of the first run, and of those after it

    def run(self) -> None:
        """Run and wait."""
        self._run(self._io, self._options[0])
        self._options[:] = self._options[-1:]


def _run_options(graph: str) -> Any:
    options = import_onnxruntime("gpu").RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options


class _Session:
    """ONNX Runtime's session for one graph, the names of its inputs, and the weights of others' that it reads."""

    def __init__(self, graph: CheckedGraph, device: Device, shared: SharedWeights | None) -> None:
        options = import_onnxruntime("gpu").SessionOptions()
        held = shared.give(graph, options) if shared else []
        self.library = _open(graph, device, options)
        self._held = held, device  # weights and stream must outlive the library's session: attributes go in this order
        self.inputs = {given.name for given in self.library.get_inputs()}


def _open(graph: CheckedGraph, device: Device, options: Any) -> Any:
    onnxruntime = import_onnxruntime("gpu")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.kind == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise MissingExtraError(
                f"this onnxruntime {onnxruntime.__version__} knows no CUDA; it comes with: pip uninstall onnxruntime; "
                "pip install 'medusa-export[gpu]'"
            )
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA's libraries as packages, where they are not installed otherwise
        cuda = {
            "device_id": str(device.index),
            "user_compute_stream": str(device.stream),
            "enable_cuda_graph": "1",
            "use_tf32": "0",  # in 16 bits too: logits are fp32, and with it fewer of a tree's tokens are plain ones
        }
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    session = open_session(onnxruntime, graph, options, providers)
    if device.kind == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise MissingExtraError(
            f"ONNX Runtime {onnxruntime.__version__} could not start its CUDA provider; the libraries that it needs "
            "come with: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return session
