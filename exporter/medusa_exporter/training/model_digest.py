"""Hashes a decoder, so that a data set can be matched with the model that it was distilled from."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

MARK = "weights:"  # prefix of a digest over all weights; without it, it covers the sizes and first embedding rows only
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
_RULES = ("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "sliding_window", "tie_word_embeddings")
_ROPE = ("rope_type", "rope_theta", "factor")
_THREADS = 4  # hashing releases the GIL


def model_digest(model: Any) -> str:
    """Hash the decoder's sizes, the settings of its layers and all its weights in bfloat16.

    The digest does not depend on the device or type that the model runs in. Weights are hashed one by one, a few at a
    time, so that only these are copied.
    """
    facts = _values(model.config, (*_SIZES, *_RULES)) | {"rope": _rope(model.config)}
    named = sorted(model.named_parameters())
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda one: _tensor_digest(one[1]), named))
    weights = [[name, list(tensor.shape), digest] for (name, tensor), digest in zip(named, digests, strict=True)]
    return MARK + hashlib.sha256(json.dumps([facts, weights], sort_keys=True).encode()).hexdigest()


def is_distilled_from(digest: str, model: Any) -> bool:
    """Return whether a data set's digest is that of the model.

    Digests of earlier versions cover less, so a fine-tuned model may share them; such a digest counts if it agrees.
    """
    return digest == (model_digest(model) if digest.startswith(MARK) else _embedding_digest(model))


def covers_all_weights(digest: str) -> bool:
    """Return whether a digest covers all weights; those of earlier versions do not."""
    return digest.startswith(MARK)


def _embedding_digest(model: Any) -> str:
    """Return the digest of earlier versions: sizes and the first 16 embedding rows."""
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
