"""The two flavours of TensorRT, TensorRT and TensorRT-RTX, and every difference between them and their versions.

TensorRT 8.6 requires explicit batches and has weakly typed networks: the types of single layers are constrained. From
version 10 on a network can be strongly typed, from 11 on it always is. TensorRT-RTX builds ahead of time, without a
GPU, for given compute capabilities.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from medusa_runtime import tensorrt_library
from medusa_runtime.errors import BundleError, MissingExtraError

FLAVOURS = tuple(tensorrt_library.MODULES)
FP32_LAYERS = ("SOFTMAX", "REDUCE", "UNARY")  # to be computed in fp32, see `_constrain_types`
TARGET = re.compile(r"sm(\d{2,3})")


@dataclass(frozen=True)
class Flavour:
    """An installed flavour: its name, its Python module and its version."""

    name: str
    trt: Any
    version: str

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds engines without the GPU that they are for."""
        return self.name == "tensorrt-rtx"

    @property
    def fuses(self) -> bool:
        """Whether its parser supports ONNX's Attention, RMSNormalization and RotaryEmbedding (TensorRT 10.15, RTX)."""
        return hasattr(self.trt, "IRotaryEmbeddingLayer")

    @property
    def max_elements(self) -> int | None:
        """Largest number of elements of a tensor; None where it is 64 bits (10, RTX; NVIDIA/TensorRT issue 3815)."""
        return None if self._strongly_typed else 2**31 - 1

    @property
    def _strongly_typed(self) -> bool:
        return hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or self._version_numbers >= (11,)

    @property
    def _version_numbers(self) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:3])

    def network(self, builder: Any) -> Any:
        """Create an empty network, typed as strongly as the flavour can."""
        flags = self.trt.NetworkDefinitionCreationFlag
        wanted = ("STRONGLY_TYPED",) if self._strongly_typed else ("EXPLICIT_BATCH",)
        return builder.create_network(sum(1 << int(getattr(flags, name)) for name in wanted if hasattr(flags, name)))

    def configure(self, config: Any, network: Any, precision: str, targets: Sequence[str]) -> None:
        """Configure a build so that the engine computes in the types of the graph.

        Args:
            config: The builder's configuration.
            network: The parsed network.
            precision: Precision of the graph.
            targets: Compute capabilities to build for, if the flavour builds ahead of time.

        Raises:
            BundleError: For targets that the flavour does not know, and a precision that it does not support.
        """
        trt, flags = self.trt, self.trt.BuilderFlag
        if hasattr(flags, "TF32"):
            config.clear_flag(flags.TF32)  # fp32 means fp32
        if not self._strongly_typed:
            self._constrain_types(config, network, precision)
        if self.fuses:
            self._allow_decomposed_attention(network)
        if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):  # before 10: else an engine has one context only
            config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
        if self.name == "tensorrt" and self._version_numbers < (9,):
            config.set_tactic_sources(0)  # cuBLAS and cuDNN, which need not be installed
        if self.ahead_of_time:
            self.check_targets(targets)
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)

    def _constrain_types(self, config: Any, network: Any, precision: str) -> None:
        """Ask for fp32 in softmax and in the statistics of norms; other layers may be computed in either type.

        TensorRT 8.6 ignores this where another implementation is faster, or the only one, so the graph itself must be
        stable in 16 bits (`graph.decompose`). With more constraints (rotary embedding, attention scores, a norm's gain)
        it finds no implementation.
        """
        trt = self.trt
        if precision == "bf16" and not hasattr(trt.BuilderFlag, "BF16"):
            raise BundleError(f"{self.name} {self.version} does not support bf16; use --precision fp16 or fp32")
        if precision == "fp32":
            return
        config.set_flag(getattr(trt.BuilderFlag, precision.upper()))
        config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
        fp32_layers = {getattr(trt.LayerType, name) for name in FP32_LAYERS}
        for layer in _layers(network):
            outputs = [layer.get_output(number) for number in range(layer.num_outputs)]
            if not all(output is not None and output.dtype == trt.DataType.FLOAT for output in outputs):
                continue
            if layer.type in fp32_layers:
                layer.precision = trt.DataType.FLOAT

    def _allow_decomposed_attention(self, network: Any) -> None:
        """Let TensorRT decompose an attention for which it has no fused kernel (fp32), in place of failing."""
        for layer in _layers(network):
            if layer.type == self.trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = self.trt.IAttentionBoundaryLayer  # TensorRT's Python does not cast layers itself
                layer.attention.decomposable = True

    def check_targets(self, targets: Sequence[str]) -> None:
        """Raise BundleError for targets that the flavour does not know, and if there are none."""
        known = {name.lower() for name in dir(self.trt.ComputeCapability) if TARGET.fullmatch(name.lower())}
        names = ", ".join(sorted(known, key=lambda name: int(name[2:])))
        if not targets:
            raise BundleError(
                f"{self.name} builds ahead of time; name the GPUs to build for: --target sm86,sm89 (of {names})"
            )
        for target in targets:
            if target not in known:
                raise BundleError(
                    f"{self.name} {self.version} does not know the target {target!r}; expected one or more of {names}"
                )


def fusing_flavours(names: Iterable[str]) -> tuple[str, ...]:
    """Return those of `names` that are installed flavours which support fused operators."""
    return tuple(name for name in dict.fromkeys(names) if name in FLAVOURS and _fuses(name))


def _fuses(name: str) -> bool:
    try:
        return find_flavour(name).fuses
    except MissingExtraError:  # the graphs are then for any version
        return False


def _layers(network: Any) -> Iterator[Any]:
    return map(network.get_layer, range(network.num_layers))


def find_flavour(name: str) -> Flavour:
    """Return the installed flavour `name`. Raises MissingExtraError, with the pip command, if it is not installed."""
    return Flavour(name, *tensorrt_library.import_tensorrt(name))
