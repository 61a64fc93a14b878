"""Reads the metadata of a GGUF file: every key that affects the logits is applied or reported as unsupported.

Keys and their defaults have llama.cpp's meaning. What neither this project nor transformers can compute is rejected
before any weight is read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_runtime.errors import MedusaError, UnsupportedModelError

from medusa_exporter.extras import import_extra

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # those that were validated against llama.cpp's logits
END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
REMEDY = "build from the model's original folder or hub name instead"
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}

# Keys that are not applied, each with a test for the values that do not change the logits.
_ANYTHING: Callable[[Any], bool] = lambda _value: True  # noqa: E731 -- an entry of the table below
HARMLESS: dict[str, Callable[[Any], bool]] = {
    "attention.causal": lambda value: value is True,
    "attention.clamp_kqv": lambda value: value == 0,
    "attention.layer_norm_epsilon": _ANYTHING,  # for norms that these architectures do not have
    "attention.max_alibi_bias": lambda value: value == 0,
    "attn_logit_softcapping": lambda value: value == 0,
    "embedding_scale": lambda value: value == 1,
    "expert_count": lambda value: value == 0,
    "expert_used_count": lambda value: value == 0,
    "final_logit_softcapping": lambda value: value == 0,
    "hidden_activation": lambda value: value == "silu",
    "logit_scale": lambda value: value == 1,
    "nextn_predict_layers": lambda value: value == 0,
    "pooling_type": _ANYTHING,  # for embedding models
    "residual_scale": lambda value: value == 1,
    "rope.scaling.alpha": lambda value: value == 0,
    "rope.scaling.finetuned": _ANYTHING,  # a note about training
    "rope.scaling.yarn_attn_factor": lambda value: value == 1,
    "rope.scaling.yarn_beta_fast": lambda value: value == YARN_BETAS["beta_fast"],
    "rope.scaling.yarn_beta_slow": lambda value: value == YARN_BETAS["beta_slow"],
    "rope.scaling.yarn_ext_factor": lambda value: value in (-1, 1),  # unset, or the value that YaRN uses
    "rope.scaling.yarn_log_multiplier": lambda value: value == 0,
    "tensor_data_layout": lambda value: value == "Meta AI original pth",  # rows permuted, as in every such file
    "use_parallel_residual": lambda value: value is False,
}


@dataclass(frozen=True)
class GgufFacts:
    """Metadata of a GGUF file.

    Attributes:
        architecture: GGUF's name of the architecture.
        config: The same facts with the keys of a config.json, including `model_type` and `rope_parameters`.
        tensors: Names of all tensors in the file.
    """

    architecture: str
    config: dict[str, Any]
    tensors: frozenset[str]


def open_gguf(path: Path) -> Any:
    """Open a file with the gguf package; raise UnsupportedModelError if it cannot be parsed."""
    try:
        return import_extra("gguf", "export").GGUFReader(str(path))
    except MedusaError:
        raise
    except Exception as error:  # the reader validates little, so a damaged file can raise any error
        raise UnsupportedModelError(
            f"{path.name}: not a readable GGUF file ({type(error).__name__}: {error}); download or convert it again"
        ) from error


def read_gguf_facts(path: Path) -> GgufFacts:
    """Read the metadata of a GGUF file, which takes seconds; the result for the last file is cached until it changes.

    Raises:
        UnsupportedModelError: The architecture is not supported, or a key has an effect that is not applied.
    """
    state = path.stat()
    return _read_facts(path.resolve(), state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1)
def _read_facts(path: Path, _changed: int, _size: int) -> GgufFacts:
    reader = open_gguf(path)
    keys = _Metadata(path.name, reader)
    architecture = keys.architecture
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path.name}: GGUF architecture {architecture!r} is not supported; "
            f"expected one of {', '.join(ARCHITECTURES)}; {REMEDY}"
        )
    if (kind := keys.general("general.type", str, "model")) != "model":
        raise UnsupportedModelError(f"{path.name}: holds a {kind!r}, expected a whole model; give the model's own file")
    if (parts := keys.general("split.count", int, 1)) > 1:
        raise UnsupportedModelError(
            f"{path.name}: one of {parts} parts, expected one file; join them with llama.cpp's llama-gguf-split --merge"
        )
    names = frozenset(tensor.name for tensor in reader.tensors)
    config = _config(keys, names, _rows(reader, path.name))
    keys.refuse_unused()
    return GgufFacts(architecture, config, names)


def _config(keys: _Metadata, names: frozenset[str], vocabulary: int) -> dict[str, Any]:
    """Translate the metadata to the keys of a config.json; `vocabulary` is the number of rows of the embedding."""
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden // heads)
    context = keys.count("context_length")
    keys.expect("attention.value_length", head_dim, "keys and values of one size")
    keys.expect("rope.dimension_count", head_dim, "a RoPE over whole heads")
    keys.expect("embedding_length_out", hidden, "outputs as wide as the embedding")
    keys.expect("vocab_size", vocabulary, "as many as the embedding has rows")
    keys.allow("attention.scale", lambda value: value == 0 or math.isclose(value, head_dim**-0.5, rel_tol=1e-5))
    keys.allow("attention.sliding_window", lambda value: value == 0 or value >= context)
    ends = [keys.general(f"tokenizer.ggml.{name}", int, None) for name in END_TOKENS]
    ends = list(dict.fromkeys(number for number in ends if number is not None))
    return {
        "model_type": keys.architecture,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "num_hidden_layers": keys.count("block_count"),
        "intermediate_size": keys.count("feed_forward_length"),
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(keys, context),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": any(_is_bias(name, "attn_q", "attn_k", "attn_v", "attn_output") for name in names),
        "mlp_bias": any(_is_bias(name, "ffn_gate", "ffn_up", "ffn_down") for name in names),
        "hidden_act": "silu",
        "bos_token_id": keys.general("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": keys.general("tokenizer.ggml.padding_token_id", int, None),
    }


def _rope(keys: _Metadata, context: int) -> dict[str, Any]:
    """Return the RoPE parameters; as in llama.cpp, a factor without a type scales linearly, and 0 means no scaling."""
    theta = keys.number("rope.freq_base", 10000.0)
    kind = keys.text("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) or 1.0
    original = keys.count("rope.scaling.original_context_length", context)
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": attention * (1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0),
            **YARN_BETAS,
        }
    if kind not in ("none", "linear"):
        raise keys.refusal("rope.scaling.type", kind, "none, linear or yarn")
    if attention != 1:
        raise keys.refusal("rope.scaling.attn_factor", attention, "1 where the RoPE type is not yarn")
    if kind == "none" or factor == 1:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _rows(reader: Any, name: str) -> int:
    """Return the number of rows of the embedding."""
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight":
            return int(tensor.shape[-1])
    raise UnsupportedModelError(
        f"{name}: without the tensor 'token_embd.weight', expected a whole model; download or convert it again"
    )


def _is_bias(name: str, *kinds: str) -> bool:
    *_, kind, last = f".{name}".split(".")
    return last == "bias" and kind in kinds


class _Metadata:
    """Typed access to the metadata of one architecture, which records the keys that were used."""

    def __init__(self, file: str, reader: Any) -> None:
        self._file = file
        self._fields: Mapping[str, Any] = reader.fields
        self._used: set[str] = set()
        self.architecture: str = self.general("general.architecture", str, "")

    def general(self, key: str, kind: type, default: Any) -> Any:
        """Return the value of a key by its full name, or the default if the file lacks it."""
        if key not in self._fields:
            return default
        value = self._value(key)
        if type(value) is not kind:
            raise UnsupportedModelError(
                f"{self._file}: {key} is {value!r:.60}, expected {kind.__name__}; download or convert it again"
            )
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Return an integer of at least 1; a list with one value per layer must have equal values."""
        value = self._own(key, default)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]
        if type(value) is not int or value < 1:
            raise self.refusal(key, value, "one whole number of at least 1 for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number of at least 0."""
        value = self._own(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise self.refusal(key, value, "a finite number of at least 0")
        return float(value)

    def text(self, key: str, default: str) -> str:
        """Return a str."""
        value = self._own(key, default)
        if type(value) is not str:
            raise self.refusal(key, value, "a text")
        return value

    def expect(self, key: str, value: int, reason: str) -> None:
        """Raise UnsupportedModelError if a key has another value; `reason` describes the expected one."""
        found = self._own(key, value)
        if found != value:
            raise self.refusal(key, found, f"{value}: {reason}")

    def allow(self, key: str, harmless: Callable[[Any], bool]) -> None:
        """Raise UnsupportedModelError if a key has a value that changes the logits."""
        if key == "" or f"{self.architecture}.{key}" not in self._fields:
            return
        value = self._own(key, None)
        try:
            fine = harmless(value)
        except (TypeError, ValueError):
            fine = False
        if not fine:
            raise self.refusal(key, value, "a model without it")

    def refuse_unused(self) -> None:
        """Raise UnsupportedModelError for every unused key of the architecture that may change the logits."""
        prefix = f"{self.architecture}."
        for key in self._fields:
            if key.startswith(prefix) and key not in self._used:
                own = key.removeprefix(prefix)
                self.allow(own, HARMLESS.get(own, lambda _value: False))

    def refusal(self, key: str, value: Any, expected: str) -> UnsupportedModelError:
        """Return the error for a key whose value is not applied."""
        return UnsupportedModelError(
            f"{self._file}: {self.architecture}.{key} is {value!r:.60}, which is not applied here; "
            f"expected {expected}; {REMEDY}"
        )

    def _own(self, key: str, default: Any) -> Any:
        name = f"{self.architecture}.{key}"
        self._used.add(name)
        if name in self._fields:
            return self._value(name)
        if default is None:
            raise UnsupportedModelError(
                f"{self._file}: without the key {name}, expected a whole model; download or convert it again"
            )
        return default

    def _value(self, key: str) -> Any:
        return self._fields[key].contents()
