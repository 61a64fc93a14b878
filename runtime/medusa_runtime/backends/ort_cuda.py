"""The ONNX Runtime backend on a CUDA GPU: one binding and one CUDA graph per shape of step."""

from __future__ import annotations

from typing import Any

from medusa_runtime import contract
from medusa_runtime.backends.base import MAX_PREFILL_CHUNK, BackendFacts
from medusa_runtime.backends.checked_graph import CheckedGraph
from medusa_runtime.backends.device import Device, DeviceTensor
from medusa_runtime.backends.device_backend import DeviceBackend
from medusa_runtime.backends.element_types import kv_type
from medusa_runtime.backends.in_place_arena import InPlaceArena
from medusa_runtime.backends.memory_check import check_device_memory
from medusa_runtime.backends.ort_library import import_onnxruntime
from medusa_runtime.backends.ort_session import open_session
from medusa_runtime.backends.shared_weights import SharedWeights
from medusa_runtime.backends.step_shape import StepShape
from medusa_runtime.bundle import Bundle
from medusa_runtime.capacity import grow_by_doubling
from medusa_runtime.errors import BundleError, MissingExtraError
from medusa_runtime.facts import HeadFacts, ModelFacts

# Smaller trees are padded to this many nodes in 16 bits: attention with a mask uses slower kernels for fewer rows.
MIN_TREE_NODES = 8
WORKSPACE_BYTES = 512 << 20  # an estimate of the memory that ONNX Runtime needs for itself
NO_CUDA_GRAPH = "-1"  # ONNX Runtime's graph id for a run that is neither captured nor replayed


def causal_graph_name(graph: str) -> str:
    """Return the file name of the causal graph that a bundle may hold next to a graph."""
    return f"{graph.removesuffix('.onnx')}-causal.onnx"


def load(
    bundle: Bundle,
    model: ModelFacts,
    name: str,
    precision: str | None,
    threads: int | None,  # noqa: ARG001
    gpu: int,
    map_weights: bool = False,  # noqa: ARG001
) -> OrtCudaBackend:
    """Load a bundle's graphs for `medusa_runtime.backends.load_backend`; `threads` and `map_weights` are ignored."""
    from medusa_runtime.backends.cuda import CudaDevice

    return load_on_device(CudaDevice(gpu), bundle, model, name, precision)


def load_on_device(
    device: Device, bundle: Bundle, model: ModelFacts, name: str, precision: str | None
) -> OrtCudaBackend:
    """Load a bundle's graph, and its causal graph if the bundle has one, on a device."""
    facts, path = bundle.graph(name, precision)
    causal_name = causal_graph_name(facts.file)
    causal = CheckedGraph(bundle.root / causal_name, bundle) if causal_name in bundle.manifest.files else None
    graph = CheckedGraph(path, bundle)
    return OrtCudaBackend(graph, model, bundle.heads, device, facts.precision, name=name, causal=causal)


class OrtCudaBackend(DeviceBackend):
    """Runs a graph with ONNX Runtime's CUDA provider, and causal steps in a second graph over the same weights.

    The first run of a shape is a plain one, the second is captured as a CUDA graph, and all later runs replay that
    graph. ONNX Runtime keeps CUDA graphs and their memory per thread, so all steps must run in the same thread.
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
        """Load the graphs.

        Args:
            graph: The graph for trees, which can run every step.
            model: The model; the KV cache is allocated for its context.
            heads: The Medusa heads.
            device: Where the graphs run.
            precision: Precision of the graphs.
            name: Name of the backend.
            causal: The graph for causal steps (prefill, plain decoding), if there is one.

        Raises:
            CapacityError: The model does not fit in the device's memory; nothing was loaded.
            BundleError: A graph cannot be loaded.
            MissingExtraError: ONNX Runtime is missing, too old or lacks CUDA.
        """
        super().__init__(name, precision, model, heads, device)
        self._weight_bytes = graph.weight_bytes
        self.mixes_drafts = True  # a step's time hardly depends on its rows: docs/results/drafts.md
        check_device_memory(device, name, model, kv_type(precision).itemsize, self._weight_bytes, WORKSPACE_BYTES)
        shared = None if causal is None else SharedWeights([graph, causal], device)
        self._session = _GpuSession(graph, device, shared)
        self._causal = None if causal is None else _GpuSession(causal, device, shared)
        if causal is not None:
            self.prefill_chunk = MAX_PREFILL_CHUNK
        self._in_place = contract.PAST_ROWS in self._session.input_names
        if self._in_place:
            self._new_arena = InPlaceArena
        self._graph_count = 0

    def facts(self) -> BackendFacts:
        """Describe device and library."""
        return self._facts("onnxruntime", import_onnxruntime("gpu").__version__, self._weight_bytes)

    def _padded_shape(self, shape: StepShape) -> StepShape:
        """Pad the nodes to the next power of two, so that prompts of all lengths share a few shapes."""
        causal = shape.causal and self._causal is not None
        nodes = grow_by_doubling(MIN_TREE_NODES if self._in_place and not causal else 1, shape.T)
        return shape._replace(T=nodes, R=nodes if shape.draft else shape.R, causal=causal)

    def _new_runner(
        self, shape: StepShape, inputs: dict[str, DeviceTensor], outputs: dict[str, DeviceTensor]
    ) -> _SessionRunner:
        session = self._causal if shape.causal and self._causal else self._session
        if unknown := sorted(session.input_names - inputs.keys()):
            raise BundleError(
                f"a graph of {self.name} asks for {unknown[0]!r}, which no step of this version has; build the bundle "
                "again"
            )
        io_binding = session.library_session.io_binding()
        used = {name: inputs[name] for name in session.input_names}
        for bind, tensors in ((io_binding.bind_input, used), (io_binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                bind(name, self._device.kind, self._device.index, tensor.onnx_type, tensor.shape, tensor.address)
        self._graph_count += 1  # an id is never used twice, because a CUDA graph holds the addresses of its capture
        return _SessionRunner(session.library_session, io_binding, str(self._graph_count))

    def _unload(self) -> None:
        for name in ("_session", "_causal"):
            vars(self).pop(name, None)


class _SessionRunner:
    """A session's bound inputs and outputs for steps of one shape, and the id of their CUDA graph."""

    def __init__(self, session: Any, io_binding: Any, graph_id: str) -> None:
        self._io_binding, self._run = io_binding, session.run_with_iobinding
        self._options = [_run_options(NO_CUDA_GRAPH), _run_options(graph_id)]  # of the first run, of all later ones

    def run(self) -> None:
        """Run one step and wait until it is done."""
        self._run(self._io_binding, self._options[0])
        self._options[:] = self._options[-1:]


def _run_options(graph_id: str) -> Any:
    options = import_onnxruntime("gpu").RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph_id)
    return options


class _GpuSession:
    """A session of ONNX Runtime with the memory it uses, and the names of its inputs."""

    def __init__(self, graph: CheckedGraph, device: Device, shared: SharedWeights | None) -> None:
        options = import_onnxruntime("gpu").SessionOptions()
        shared_values = shared.add_to(options, graph) if shared else []
        self.library_session = _open(graph, device, options)
        self._kept_alive = shared_values, device  # set last: attributes are freed in order, the session before these
        self.input_names = {tensor.name for tensor in self.library_session.get_inputs()}


def _open(graph: CheckedGraph, device: Device, options: Any) -> Any:
    onnxruntime = import_onnxruntime("gpu")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.kind == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise MissingExtraError(
                f"onnxruntime {onnxruntime.__version__} has no CUDA provider, expected onnxruntime-gpu; install it: "
                "pip uninstall onnxruntime; pip install 'medusa-export[gpu]'"
            )
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA's libraries from Python packages, where they are not installed otherwise
        cuda_options = {
            "device_id": str(device.index),
            "user_compute_stream": str(device.stream),
            "enable_cuda_graph": "1",
            # In 16 bits too: logits are fp32, and with TF32 fewer tokens of a tree equal those of plain decoding.
            "use_tf32": "0",
        }
        providers.insert(0, ("CUDAExecutionProvider", cuda_options))
    session = open_session(onnxruntime, graph, options, providers)
    if device.kind == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise MissingExtraError(
            f"ONNX Runtime {onnxruntime.__version__} could not start its CUDA provider, expected CUDA and cuDNN; "
            "install them: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return session
