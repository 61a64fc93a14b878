"""Loads the decoder of a GGUF file: each tensor becomes one weight, and each weight comes from one tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from medusa_runtime.errors import UnsupportedModelError
from numpy.typing import NDArray

from medusa_exporter.extras import import_extra
from medusa_exporter.loading.gguf_metadata import REMEDY, GgufFacts, open_gguf, read_gguf_facts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ROPE_FACTORS = "rope_freqs.weight"  # (D / 2,): divisor of each pair's frequency, in all layers
PERMUTED = "llama"  # the architecture whose query and key rows are stored with the two rows of a RoPE pair adjacent
SHOWN = 4  # names in a message


def load_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal decoder of a GGUF file on the CPU, with dequantised weights.

    Args:
        path: The GGUF file.
        dtype: Element type of the loaded weights.

    Raises:
        UnsupportedModelError: As for `read_gguf_facts`; or a tensor has no weight, a weight has no tensor, or a tensor
            has another shape or a quantisation that the gguf package does not support.
    """
    import torch
    import transformers

    facts = read_gguf_facts(path)
    config = transformers.AutoConfig.for_model(**facts.config)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in kind(config).named_parameters()}
    names = _match(path.name, facts, list(shapes))
    reader = open_gguf(path)
    held = {tensor.name: tensor for tensor in reader.tensors}
    reader.fields.clear()  # one array per token and merge, which need more memory than the weights of a small model
    weights = {
        name: torch.zeros(shapes[name], dtype=dtype)
        if tensor is None
        else torch.from_numpy(_weight(path.name, facts, held[tensor], shapes[name])).to(dtype)
        for name, tensor in names.items()
    }
    model: PreTrainedModel = kind.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, attn_implementation="sdpa"
    )
    if ROPE_FACTORS in facts.tensors:
        _divide_frequencies(path.name, model, _dequantised(path.name, held[ROPE_FACTORS]))
    return model


def _match(file: str, facts: GgufFacts, weights: Collection[str]) -> dict[str, str | None]:
    """Map each weight to its tensor, or to None for a bias that no layer of the file has; it is then zero."""
    gguf = import_extra("gguf", "export")
    [architecture] = [number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == facts.architecture]
    table = gguf.get_tensor_name_map(architecture, facts.config["num_hidden_layers"])
    names: dict[str, str | None] = {}
    for weight in weights:
        stem, _, suffix = weight.rpartition(".")
        names[weight] = f"{table.get_name(stem)}.{suffix}"
    taken = set(names.values()) | ({ROPE_FACTORS} if facts.architecture == PERMUTED else set())
    if unknown := sorted(facts.tensors - taken):
        raise UnsupportedModelError(
            f"{file}: {_listed(unknown)}: {_counted(unknown)} that the architecture {facts.architecture!r} does not "
            f"take here; expected its weights alone; {REMEDY}"
        )
    kinds = {_kind(name) for name in facts.tensors}
    missing = {weight: name for weight, name in names.items() if name not in facts.tensors}
    absent = {weight for weight, name in missing.items() if weight.endswith(".bias") and _kind(str(name)) not in kinds}
    if lost := [str(name) for weight, name in missing.items() if weight not in absent]:
        raise UnsupportedModelError(
            f"{file}: without {_listed(lost)}: {_counted(lost)} of the model missing; expected all weights of "
            f"{facts.config['num_hidden_layers']} layers; download or convert it again"
        )
    return {weight: None if weight in absent else name for weight, name in names.items()}


def _weight(file: str, facts: GgufFacts, tensor: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a copy of a tensor's weight, with its rows in the order that transformers expects.

    Example: for a head of 4 rows, llama.cpp stores the rows in the order 0, 2, 1, 3, where (0, 2) and (1, 3) are the
    pairs that RoPE rotates; transformers expects 0, 1, 2, 3.
    """
    array = _dequantised(file, tensor)
    if array.shape != shape:
        raise UnsupportedModelError(
            f"{file}: the tensor {tensor.name} has the shape {array.shape}, expected {shape} by the file's own keys; "
            "download or convert it again"
        )
    if facts.architecture == PERMUTED and (heads := _heads(facts.config, tensor.name)):
        pairs = array.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
        array = pairs.swapaxes(1, 2).reshape(shape)
    return np.array(array, dtype=np.float32)


def _heads(config: Mapping[str, Any], tensor: str) -> int:
    """Return the number of heads of a tensor whose rows RoPE rotates; 0 for other tensors."""
    kinds = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    return next((config[count] for kind, count in kinds.items() if f".{kind}." in tensor), 0)


def _dequantised(file: str, tensor: Any) -> NDArray[np.float32]:
    gguf = import_extra("gguf", "export")
    try:
        array: NDArray[np.float32] = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedModelError(
            f"{file}: the tensor {tensor.name} is stored as {tensor.tensor_type.name}, which gguf cannot dequantise "
            f"({error}); expected floats or a quantisation that it knows; {REMEDY}"
        ) from error
    return array


def _divide_frequencies(file: str, model: PreTrainedModel, factors: NDArray[np.float32]) -> None:
    """Divide the RoPE frequencies, as llama.cpp does in addition to any other scaling."""
    import torch

    rope: Any = model.base_model.rotary_emb
    if factors.shape != tuple(rope.inv_freq.shape) or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise UnsupportedModelError(
            f"{file}: {ROPE_FACTORS} has the shape {factors.shape} and values from {factors.min():.3g} to "
            f"{factors.max():.3g}, expected {tuple(rope.inv_freq.shape)} positive factors; download or convert it again"
        )
    divided = rope.inv_freq / torch.from_numpy(np.array(factors, np.float32)).to(rope.inv_freq.device)
    rope.inv_freq = divided
    rope.original_inv_freq = divided.clone()


def _kind(name: str) -> str:
    """Return a tensor's name without its layer: `blk.3.attn_q.bias` becomes `attn_q.bias`."""
    return name.split(".", 2)[2] if name.startswith("blk.") else name


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _counted(names: list[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"
