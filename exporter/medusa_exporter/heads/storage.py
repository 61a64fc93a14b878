"""Saves heads as `medusa_lm_head.safetensors` and `config.json`, and loads heads of every published layout.

Only safetensors are loaded; `convert` reads pickles.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from medusa_exporter.files import atomic_write_files, write_json
from medusa_exporter.heads.architecture import infer_architecture, stored_architecture
from medusa_exporter.heads.compatibility import check_indices, check_sizes
from medusa_exporter.heads.config import warn_of_mismatches
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.files import CONFIG_NAME, WEIGHTS_NAME
from medusa_exporter.heads.headers import StoredHeads, TensorInfo, find_heads
from medusa_exporter.heads.layouts import MAP_NAME, TAPS_NAME, TRUNK_NAMES
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.heads.vocabulary_padding import LM_HEAD, fit_lm_heads, scored_tokens


def save_heads(
    heads: MedusaHeads,
    folder: str | Path,
    extras: dict[str, Any],
    dtype: torch.dtype = torch.float16,
    others: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Save heads, a token_map and taps as int64.

    Args:
        heads: The heads.
        folder: The folder to write to.
        extras: Further keys of config.json, such as `base_model_name_or_path` and `vocab_size`.
        dtype: Type of the weights.
        others: Further JSON files by name, which appear together with the heads.

    Raises:
        HeadsError: A weight is not finite, or too large for `dtype`.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in _named_tensors(heads).items()}
    if heads.token_map is not None:
        tensors[MAP_NAME] = heads.token_map.detach().cpu()
    if heads.taps:
        tensors[TAPS_NAME] = torch.tensor(heads.taps)
    write_tensors(tensors, folder, extras, f"heads to be stored as {dtype}", others)


def write_tensors(
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    extras: dict[str, Any],
    where: str,
    others: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Write weights by the Medusa authors' names, and the config.json that describes them.

    The files appear together: an interrupted process leaves the old ones.

    Args:
        tensors: The weights, which keep their type.
        folder: The folder to write to.
        extras: As for `save_heads`.
        where: What the weights are, for messages.
        others: As for `save_heads`.

    Raises:
        HeadsError: A weight is not finite, or the weights do not fit together.
    """
    facts = infer_architecture({name: tuple(tensor.shape) for name, tensor in tensors.items()}, where)
    check_values(tensors, where)
    config = {
        "version": "2",
        "medusa_num_heads": facts.heads,
        "medusa_num_layers": facts.layers,
        "medusa_conditioning": facts.conditioning,
        "hidden_size": facts.hidden_size,
        **({} if facts.draft_vocabulary is None else {"draft_vocabulary": facts.draft_vocabulary}),
        **({"medusa_taps": tensors[TAPS_NAME].tolist()} if facts.taps else {}),
        **({"medusa_trunk": facts.trunk} if facts.trunk else {}),
        **extras,
    }
    with atomic_write_files(Path(folder)) as new:
        # one key only: the order of several would change from run to run
        data = safetensors.torch.save(_unshare_memory(tensors), metadata={"format": "pt"})
        (new / WEIGHTS_NAME).write_bytes(data)  # save_file would make it readable for its owner only
        for name, content in {CONFIG_NAME: config, **(others or {})}.items():
            write_json(new / name, content)


def load_heads(source: str | Path, hidden_size: int, vocab_size: int, tokens: int | None = None) -> MedusaHeads:
    """Load heads of any published layout in fp32, for use with a decoder.

    The architecture follows from the weights; a config.json that differs causes a UserWarning. lm_heads of a vocabulary
    that is padded to another size are fitted, see `vocabulary_padding`.

    Args:
        source: A folder, or a hub name `owner/name` or `owner/name@revision`.
        hidden_size: Hidden size of the decoder.
        vocab_size: Vocabulary size of the decoder.
        tokens: Number of tokens of the model's tokenizer, `None` if it is not known.

    Returns:
        The heads, in evaluation mode.

    Raises:
        HeadsError: There are no heads, they are damaged, or they belong to another model.
    """
    stored = find_heads(source)
    facts = stored_architecture(stored)
    check_sizes(facts, hidden_size, vocab_size, source, tokens)
    tensors = read_tensors(stored)
    check_values(tensors, stored.where, scored_tokens(facts, vocab_size))
    taps = read_taps(tensors)
    warn_of_mismatches(source, stored.layout, facts, vocab_size, taps)
    tensors = fit_lm_heads(select_draft_rows(tensors), vocab_size)
    heads = MedusaHeads(
        hidden_size,
        facts.heads,
        facts.layers,
        facts.conditioning,
        len(tensors[f"0.{facts.layers}.weight"]) if facts.own_lm_head_size else None,
        tensors.get(MAP_NAME),
        taps=taps,
        trunk=facts.trunk,
    )
    _fill(heads, tensors)
    return heads.requires_grad_(False).eval()


def read_tensors(stored: StoredHeads) -> dict[str, Tensor]:
    """Read the heads' weights by the authors' names, and no other tensors; biases that are left out are zeros.

    Raises:
        HeadsError: A file is damaged.
    """
    tensors = read_weights({name: entry for name, entry in stored.entries.items() if entry})
    return add_zero_biases(tensors, stored.entries)


def read_weights(entries: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Read single tensors from safetensors files; raise HeadsError for a damaged file."""
    tensors: dict[str, Tensor] = {}
    for path in sorted({entry.file for entry in entries.values()}):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                held = {name: entry.name for name, entry in entries.items() if entry.file == path}
                tensors |= {name: file.get_tensor(stored) for name, stored in held.items()}
        except (safetensors.SafetensorError, ValueError) as error:
            raise HeadsError(f"{path}: damaged safetensors file ({error}); download or make it again") from error
    return tensors


def add_zero_biases(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Add the biases among `names` that a layout leaves out: one zero per row of the linear's weight."""
    weights = {name: tensors[name.removesuffix("bias") + "weight"] for name in names if name not in tensors}
    return {**tensors, **{name: torch.zeros(len(weight), dtype=weight.dtype) for name, weight in weights.items()}}


def select_draft_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select from lm_heads with a row per token, (V, H), the rows that the token_map names, (D, H), in its order."""
    token_map = tensors.get(MAP_NAME)
    if token_map is None:
        return dict(tensors)
    lm_heads = [name for name in tensors if LM_HEAD.fullmatch(name)]
    return {**tensors, **{name: tensors[name][token_map] for name in lm_heads if len(tensors[name]) != len(token_map)}}


def read_taps(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the decoder layers that the heads tap, in order."""
    return tuple(tensors[TAPS_NAME].tolist()) if TAPS_NAME in tensors else ()


def check_values(tensors: Mapping[str, Tensor], where: str, scored: int | None = None) -> None:
    """Raise HeadsError unless all weights are finite, and taps and token_map pass `check_indices`."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise HeadsError(
                f"{where}: {name} holds NaN or infinite values; expected finite weights: train or "
                "download the heads again"
            )
    taps, token_map = (tensors.get(name, torch.zeros(0, dtype=torch.int64)).numpy() for name in (TAPS_NAME, MAP_NAME))
    check_indices(taps, token_map, where, scored)


def _unshare_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each weight its own memory, as safetensors requires: one lm_head may have many names."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        apart[name] = whole.clone() if whole.data_ptr() in seen else whole
        seen.add(whole.data_ptr())
    return apart


def _named_tensors(heads: MedusaHeads) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for head in range(heads.heads):
        for layer in range(heads.layers):
            named[f"{head}.{layer}.linear.weight"] = heads.weights[layer][head].detach().cpu().T  # (H, in)
            named[f"{head}.{layer}.linear.bias"] = heads.biases[layer][head, 0].detach().cpu()
        if heads.own_lm_head is not None:
            named[f"{head}.{heads.layers}.weight"] = heads.own_lm_head[head].detach().cpu().T  # (D, H)
    if heads.trunk:
        named |= {name: weight.detach().cpu().T for name, weight in _trunk(heads).items()}  # (out, in)
    return named


def _trunk(heads: MedusaHeads) -> dict[str, Tensor]:
    return dict(zip(TRUNK_NAMES, (heads.gate, heads.up, heads.down), strict=True))


def _fill(heads: MedusaHeads, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for head in range(heads.heads):
            for layer in range(heads.layers):
                heads.weights[layer][head] = tensors[f"{head}.{layer}.linear.weight"].float().T
                heads.biases[layer][head, 0] = tensors[f"{head}.{layer}.linear.bias"].float()
            if heads.own_lm_head is not None:
                heads.own_lm_head[head] = tensors[f"{head}.{heads.layers}.weight"].float().T
        for name, weight in (_trunk(heads) if heads.trunk else {}).items():
            weight.copy_(tensors[name].float().T)
