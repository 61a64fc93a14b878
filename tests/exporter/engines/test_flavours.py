"""What a weakly typed network is asked for, on a network of no real TensorRT: that one has no GPU to build for here."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
from medusa_exporter.engines.flavours import Flavour, fusing_flavours
from medusa_runtime.errors import BundleError

DataType = Enum("DataType", "FLOAT HALF INT32")
LayerType = Enum("LayerType", "SOFTMAX REDUCE UNARY MATRIX_MULTIPLY ELEMENTWISE ATTENTION_INPUT")
BuilderFlag = Enum("BuilderFlag", "TF32 FP16 PREFER_PRECISION_CONSTRAINTS")
TRT = SimpleNamespace(
    DataType=DataType,
    LayerType=LayerType,
    BuilderFlag=BuilderFlag,
    NetworkDefinitionCreationFlag=SimpleNamespace(EXPLICIT_BATCH=0),
    PreviewFeature=SimpleNamespace(),
)


class Layer:
    def __init__(self, kind: LayerType, dtype: DataType) -> None:
        self.type, self.dtype, self.num_outputs = kind, dtype, 1
        self.precision: DataType | None = None
        self.outputs: dict[int, DataType] = {}

    def get_output(self, number: int) -> Any:
        return SimpleNamespace(dtype=self.dtype)

    def set_output_type(self, number: int, dtype: DataType) -> None:
        self.outputs[number] = dtype


class Config:
    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.remove(flag)

    def set_tactic_sources(self, sources: int) -> None:
        assert sources == 0


def asked(precision: str) -> tuple[set[BuilderFlag], list[Layer]]:
    layers = [
        Layer(LayerType.SOFTMAX, DataType.FLOAT),
        Layer(LayerType.REDUCE, DataType.INT32),
        Layer(LayerType.MATRIX_MULTIPLY, DataType.HALF),
        Layer(LayerType.ELEMENTWISE, DataType.FLOAT),
    ]
    network = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    config = Config()
    Flavour("tensorrt", TRT, "8.6.0").configure(config, network, precision, ())
    return config.flags, layers


def test_in_fp16_softmax_is_asked_for_in_fp32() -> None:
    flags, (softmax, *others) = asked("fp16")
    assert flags == {BuilderFlag.FP16, BuilderFlag.PREFER_PRECISION_CONSTRAINTS}
    assert softmax.precision == DataType.FLOAT
    assert all(layer.precision is None and not layer.outputs for layer in others)


def test_in_fp32_nothing_is_asked_for() -> None:
    flags, layers = asked("fp32")
    assert not flags
    assert all(layer.precision is None and not layer.outputs for layer in layers)


class Fusing(SimpleNamespace):
    """A network of one attention, whose layer TensorRT's Python returns as a plain layer until it is cast."""

    def __init__(self) -> None:
        self.attention = SimpleNamespace(decomposable=False)
        layers = [Layer(LayerType.ATTENTION_INPUT, DataType.HALF), Layer(LayerType.SOFTMAX, DataType.FLOAT)]
        super().__init__(num_layers=2, get_layer=layers.__getitem__)
        boundary = type("IAttentionBoundaryLayer", (Layer,), {"attention": self.attention})
        flags = SimpleNamespace(STRONGLY_TYPED=1)
        self.trt = SimpleNamespace(
            **vars(TRT) | {"NetworkDefinitionCreationFlag": flags},
            IAttentionBoundaryLayer=boundary,
            IRotaryEmbeddingLayer=object,
        )


def test_attention_may_be_parted_where_it_is_fused() -> None:
    network = Fusing()
    flavour = Flavour("tensorrt", network.trt, "10.15.1")
    assert flavour.fuses and not Flavour("tensorrt", TRT, "8.6.0").fuses
    flavour.configure(Config(), network, "fp16", ())
    assert network.attention.decomposable


def test_before_10_a_tensor_has_fewer_elements_than_32_bits_count() -> None:
    assert Flavour("tensorrt", TRT, "8.6.0").max_elements == 2**31 - 1
    assert Flavour("tensorrt", Fusing().trt, "10.15.1").max_elements is None


def test_flavours_that_are_installed_and_fuse() -> None:
    assert fusing_flavours(["ort-cpu", "tensorrt", "tensorrt-rtx", "tensorrt-rtx"]) == ("tensorrt-rtx",)


def test_a_flavour_without_bf16_refuses_it() -> None:
    with pytest.raises(BundleError, match=r"tensorrt 8\.6\.0 does not support bf16; use --precision fp16 or fp32"):
        asked("bf16")
