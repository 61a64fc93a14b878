"""Which decoder a data set was distilled from: a digest over everything that makes its answers."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

MARK = "weights:"  # before a digest over all weights; one without it is of the sizes and the first embedding rows alone
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
_RULES = ("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "sliding_window", "tie_word_embeddings")
_ROPE = ("rope_type", "rope_theta", "factor")
_THREADS = 4  # hashing lets other threads run


def model_digest(model: Any) -> str:
    """Digest of the decoder's sizes, the rules of its layers and all its weights in bfloat16.

    It is the same whatever dtype the model runs in and wherever it lies. Each weight is hashed by itself, some at a
    time, so that no more than these are copied.
    """
    facts = _values(model.config, (*_SIZES, *_RULES)) | {"rope": _rope(model.config)}
    named = sorted(model.named_parameters())
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda one: _tensor_digest(one[1]), named))
    weights = [[name, list(tensor.shape), digest] for (name, tensor), digest in zip(named, digests, strict=True)]
    return MARK + hashlib.sha256(json.dumps([facts, weights], sort_keys=True).encode()).hexdigest()


def is_distilled_from(digest: str, model: Any) -> bool:
    """Tell whether a data set's digest is the model's.

    Data sets of earlier versions have a digest of less, which a fine-tune may share; they count where that agrees.
    """
    return digest == (model_digest(model) if digest.startswith(MARK) else _embedding_digest(model))


def covers_all_weights(digest: str) -> bool:
    """Tell a digest over all weights from one of an earlier version."""
    return digest.startswith(MARK)


def _embedding_digest(model: Any) -> str:
    """What earlier versions wrote: sizes and the first 16 embedding rows."""
    facts = json.dumps(_values(model.config, _SIZES), sort_keys=True)
    rows = _bytes(model.get_input_embeddings().weight[:16])
    return hashlib.sha256(facts.encode() + rows).hexdigest()


def _values(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in names}


def _rope(config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None)
    return {name: rope.get(name) for name in _ROPE} if isinstance(rope, dict) else {}


def _tensor_digest(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    rows = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    return rows.view(torch.int16).numpy().tobytes()
