"""The flavours of TensorRT, and all in which they differ; nothing else asks which one it has.

TensorRT 8.6 wants explicit batches and types its network weakly: layers are held to the graph's types one by one. From
10 on a network is strongly typed, in 11 always. TensorRT-RTX builds ahead of time, without a GPU, for named compute
capabilities.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from medusa_runtime import tensorrt_library
from medusa_runtime.errors import BundleError, MissingExtraError

FLAVOURS = tuple(tensorrt_library.MODULES)
HELD = ("SOFTMAX", "REDUCE", "UNARY")  # what a weakly typed network computes in fp32, see `_hold_types`
TARGET = re.compile(r"sm(\d{2,3})")


@dataclass(frozen=True)
class Flavour:
    """One installed flavour: its name, its module, its version."""

    name: str
    trt: Any
    version: str

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for GPUs that are not there."""
        return self.name == "tensorrt-rtx"

    @property
    def fuses(self) -> bool:
        """Whether its parser takes ONNX's Attention, RMSNormalization and RotaryEmbedding (TensorRT 10.15, RTX)."""
        return hasattr(self.trt, "IRotaryEmbeddingLayer")

    @property
    def most_elements(self) -> int | None:
        """Of one tensor; None from TensorRT 10 on and in RTX, which count by 64 bits (NVIDIA/TensorRT issue 3815)."""
        return None if self._strong else 2**31 - 1

    @property
    def _strong(self) -> bool:
        return hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or self._numbers >= (11,)

    @property
    def _numbers(self) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:3])

    def network(self, builder: Any) -> Any:
        """Create an empty network, typed as strongly as the flavour can."""
        flags = self.trt.NetworkDefinitionCreationFlag
        wanted = ("STRONGLY_TYPED",) if self._strong else ("EXPLICIT_BATCH",)
        return builder.create_network(sum(1 << int(getattr(flags, name)) for name in wanted if hasattr(flags, name)))

    def configure(self, config: Any, network: Any, precision: str, targets: Sequence[str]) -> None:
        """Set what makes the engine compute as the graph is typed, for the GPU here or for `targets`.

        Raises BundleError for targets that the flavour does not know, and a precision that it cannot hold.
        """
        trt, flags = self.trt, self.trt.BuilderFlag
        if hasattr(flags, "TF32"):
            config.clear_flag(flags.TF32)  # fp32 means fp32
        if not self._strong:
            self._hold_types(config, network, precision)
        if self.fuses:
            self._let_attention_be_parted(network)
        if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):  # before 10: or an engine would serve one context alone
            config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
        if self.name == "tensorrt" and self._numbers < (9,):
            config.set_tactic_sources(0)  # cuBLAS and cuDNN, which need not be installed
        if self.ahead_of_time:
            self.check_targets(targets)
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)

    def _hold_types(self, config: Any, network: Any, precision: str) -> None:
        """Hold softmax and a norm's statistics to fp32; the rest may take either type.

        That is a wish: 8.6 breaks it where it finds something faster, or nothing, so the graph itself must bear 16 bits
        everywhere (`graph.primitives`). Held to more (rope, scores, a norm's gain) it finds no implementation.
        """
        trt = self.trt
        if precision == "bf16" and not hasattr(trt.BuilderFlag, "BF16"):
            raise BundleError(f"{self.name} {self.version} knows no bf16; take --precision fp16 or fp32")
        if precision == "fp32":
            return
        config.set_flag(getattr(trt.BuilderFlag, precision.upper()))
        config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
        held = {getattr(trt.LayerType, name) for name in HELD}
        for layer in _layers(network):
            outputs = [layer.get_output(number) for number in range(layer.num_outputs)]
            if not all(output is not None and output.dtype == trt.DataType.FLOAT for output in outputs):
                continue
            if layer.type in held:
                layer.precision = trt.DataType.FLOAT

    def _let_attention_be_parted(self, network: Any) -> None:
        """Where there is no kernel of its own for an attention (fp32), it is built of parts; otherwise nothing is."""
        for layer in _layers(network):
            if layer.type == self.trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = self.trt.IAttentionBoundaryLayer  # how TensorRT's Python tells what a layer is
                layer.attention.decomposable = True

    def check_targets(self, targets: Sequence[str]) -> None:
        """Raise BundleError for GPUs that the flavour does not know, or where none is named."""
        known = {name.lower() for name in dir(self.trt.ComputeCapability) if TARGET.fullmatch(name.lower())}
        names = ", ".join(sorted(known, key=lambda name: int(name[2:])))
        if not targets:
            raise BundleError(f"{self.name} builds ahead of time; say for which GPUs: --target sm86,sm89 (of {names})")
        for target in targets:
            if target not in known:
                raise BundleError(f"{self.name} {self.version} knows no target {target!r}; expected some of {names}")


def fusing(names: Iterable[str]) -> tuple[str, ...]:
    """Return those of `names` that are flavours, installed, and take fused operators."""
    return tuple(name for name in dict.fromkeys(names) if name in FLAVOURS and _fuses(name))


def _fuses(name: str) -> bool:
    try:
        return find(name).fuses
    except MissingExtraError:  # its graphs are then such that any version reads
        return False


def _layers(network: Any) -> Iterator[Any]:
    return map(network.get_layer, range(network.num_layers))


def find(name: str) -> Flavour:
    """Return the installed flavour `name`. Raises MissingExtraError with the pip command."""
    return Flavour(name, *tensorrt_library.import_tensorrt(name))
