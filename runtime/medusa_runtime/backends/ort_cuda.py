"""ONNX Runtime on a CUDA GPU: all but a step's small arrays stays in its memory, one CUDA graph for each shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medusa_runtime import contract
from medusa_runtime.backends.arena import Tensor
from medusa_runtime.backends.base import BackendFacts
from medusa_runtime.backends.device import Device
from medusa_runtime.backends.elements import element
from medusa_runtime.backends.head_arena import HeadArena
from medusa_runtime.backends.on_device import OnDevice, Shape, check_room
from medusa_runtime.backends.ort import find_library, open_session
from medusa_runtime.backends.step_memory import StepMemory
from medusa_runtime.backends.weights import weight_bytes
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import MissingExtraError
from medusa_runtime.facts import HeadFacts, ModelFacts
from medusa_runtime.sizes import doubled

# Nodes that a step in 16 bits is padded to, if it has fewer: attention of a row alone takes slower kernels (1.475 ms a
# step; 8 nodes 1.405, 16 1.437, 32 1.479; SmolLM2-135M on an H200).
LEAST_NODES = 8
WORKSPACE = 512 << 20  # bytes that ONNX Runtime takes for itself, about
NO_GRAPH = "-1"  # ONNX Runtime's word for a run that is neither captured nor replayed


def load(
    bundle: Bundle,
    model: ModelFacts,
    name: str,
    precision: str | None,
    threads: int | None,  # noqa: ARG001
) -> OrtCudaBackend:
    """Make the backend that `medusa_runtime.backends.load_backend` asks for; threads mean nothing to a GPU."""
    from medusa_runtime.backends.cuda import CudaDevice

    facts, path = bundle.graph(name, precision)
    weights = weight_bytes(path)
    return OrtCudaBackend(path, model, bundle.heads, CudaDevice(), facts.precision, name=name, weights=weights)


class OrtCudaBackend(OnDevice):
    """Runs a graph with the CUDA provider.

    The first run of a shape is a plain one, the second is captured as a CUDA graph, all others replay that.
    """

    def __init__(
        self,
        graph: Path,
        model: ModelFacts,
        heads: HeadFacts,
        device: Device,
        precision: str,
        *,
        name: str = "ort-cuda",
        weights: int = 0,
    ) -> None:
        """Load `graph`. weights: its bytes. Raises CapacityError, before anything is loaded, where they do not fit."""
        super().__init__(name, precision, model, heads, device)
        check_room(device, name, model, element(precision).size, weights, WORKSPACE)
        self._session = _session(graph, device)
        self._least = 1
        if contract.PAST_ROWS in {given.name for given in self._session.get_inputs()}:
            self._new_arena, self._least = HeadArena, LEAST_NODES
        self._graphs = 0
        self._weights = weights

    def facts(self) -> BackendFacts:
        """Describe device and library."""
        return self._described("onnxruntime", find_library("gpu").__version__, self._weights)

    def _served(self, shape: Shape) -> Shape:
        """Pad to the next power of two, so that all lengths of prompts are of few shapes; in 16 bits a lone row too."""
        nodes = doubled(self._least, shape.T)
        return shape._replace(T=nodes, R=nodes if shape.draft else shape.R)

    def _new_binding(
        self, shape: Shape, memory: StepMemory, given: dict[str, Tensor], made: dict[str, Tensor]
    ) -> _Binding:
        io = self._session.io_binding()
        for bind, tensors in ((io.bind_input, given), (io.bind_output, made)):
            for name, tensor in tensors.items():
                bind(name, self._device.kind, 0, tensor.number, tensor.shape, tensor.address)
        self._graphs += 1  # never used again: a graph holds the addresses of its first run
        return _Binding(self._session, io, shape, memory, str(self._graphs))


class _Binding:
    """The session's inputs and outputs for steps of one shape. graph: the id of its CUDA graph."""

    def __init__(self, session: Any, io: Any, shape: Shape, memory: StepMemory, graph: str) -> None:
        self.shape, self.memory = shape, memory
        self._run, self._io = session.run_with_iobinding, io
        self._options = [_run_options(NO_GRAPH), _run_options(graph)]  # of the first run, and of those after it

    def run(self) -> None:
        """Run and wait."""
        self._run(self._io, self._options[0])
        self._options[:] = self._options[-1:]


def _run_options(graph: str) -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options


def _session(graph: Path, device: Device) -> Any:
    onnxruntime = find_library("gpu")
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
            "user_compute_stream": str(device.stream),
            "enable_cuda_graph": "1",
            "use_tf32": "0",  # logits are fp32 in every precision: a tree's are to be plain decoding's
        }
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    session = open_session(onnxruntime, graph, onnxruntime.SessionOptions(), providers)
    if device.kind == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise MissingExtraError(
            f"ONNX Runtime {onnxruntime.__version__} could not start its CUDA provider; the libraries that it needs "
            "come with: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return session
