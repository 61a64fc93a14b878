"""The published layouts of Medusa heads: how each of them names the weights.

Every layout is mapped to the names of the Medusa authors, for heads of L ResBlocks: `{head}.{layer}.linear.weight`,
`{head}.{layer}.linear.bias`, `{head}.{L}.weight` (a head's own lm_head), and `token_map`. What `modules` offers beyond
the paper has names that no publisher uses: `taps` and `trunk.{gate,up,down}.weight`.
Sources: FasterDecoding/Medusa (v0.1 and version 2: `medusa/train/train_legacy.py`; v1.0: `medusa_model.py`),
huggingface/text-generation-inference (`layers/medusa.py`), vllm-project/vllm (`model_executor/models/medusa.py`,
`transformers_utils/configs/medusa.py`), NVIDIA ModelOpt (`torch/speculative/plugins`, `torch/export/plugins`) and
TensorRT-LLM (`models/medusa`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from medusa_exporter.heads.errors import HeadsError

MAP_NAME, TAPS_NAME = "token_map", "taps"
TRUNK_NAMES = ("trunk.gate.weight", "trunk.up.weight", "trunk.down.weight")
INDEX_NAMES = (MAP_NAME, TAPS_NAME)  # token ids or layer numbers, not weights

_Key = TypeVar("_Key")
_N = r"(0|[1-9]\d{0,3})"  # a head's or a layer's number
_AUTHORS_LINEAR, _AUTHORS_LM_HEAD = rf"{_N}\.{_N}\.linear\.(weight|bias)", rf"{_N}\.{_N}\.weight"
_AUTHORS_KEYS = {
    "medusa_num_heads": "heads",
    "medusa_num_layers": "layers",
    "medusa_conditioning": "conditioning",
    "hidden_size": "hidden_size",
    "vocab_size": "vocabulary",
    "draft_vocabulary": "draft_vocabulary",
    "medusa_taps": "taps",
    "medusa_trunk": "trunk",
}


@dataclass(frozen=True)
class Layout:
    """One way to name the weights of heads. Patterns are regular expressions for whole names.

    Attributes:
        title: Name of the layout, for messages.
        linear: Pattern of the ResBlocks' linears, with groups for head, layer and `weight` or `bias`.
        lm_head: Pattern of the heads' lm_heads, with groups for head and, if the layout numbers it, layer.
        config_keys: Which fact each key of config.json states; a dot leads into a nested object.
        shared_lm_head: Pattern of one lm_head for all heads, `None` if the layout has none.
        draft_map: Pattern of the ids that the rows of an lm_head score, `None` if the layout has none.
        further: Names that the authors' layout has, too.
        prefix: Start of the heads' names if they are stored together with the decoder's weights.
        biases: `False` if the biases may be left out because they are zero.
    """

    title: str
    linear: str
    lm_head: str
    config_keys: Mapping[str, str]
    shared_lm_head: str | None = None
    draft_map: str | None = None
    further: tuple[str, ...] = ()
    prefix: str = ""
    biases: bool = True

    def owns(self, name: str) -> bool:
        """Return whether a weight of this name belongs to the heads, known or not."""
        return name.startswith(self.prefix)


LAYOUTS = (
    Layout(
        "the Medusa authors' layout (v0.1, version 2, TGI)",
        _AUTHORS_LINEAR,
        _AUTHORS_LM_HEAD,
        _AUTHORS_KEYS,
        draft_map=MAP_NAME,
        further=(TAPS_NAME, *TRUNK_NAMES),
    ),
    Layout(
        "the Medusa authors' v1.0 layout (merged with the decoder)",
        rf"medusa_head\.{_AUTHORS_LINEAR}",
        rf"medusa_head\.{_AUTHORS_LM_HEAD}",
        _AUTHORS_KEYS,
        prefix="medusa_head.",
    ),
    Layout(
        "ModelOpt's layout (merged with the decoder)",
        rf"medusa_heads\.{_AUTHORS_LINEAR}",
        rf"medusa_heads\.{_AUTHORS_LM_HEAD}",
        {
            "medusa.num_medusa_heads": "heads",
            "medusa.num_medusa_layers": "layers",
            "hidden_size": "hidden_size",
            "vocab_size": "vocabulary",
        },
        prefix="medusa_heads.",
    ),
    Layout(
        "TensorRT-LLM's layout (merged with the decoder)",
        rf"medusa_heads\.{_N}\.medusa_layers\.{_N}\.linear\.(weight|bias)",
        rf"medusa_heads\.{_N}\.lm_head\.weight",
        {
            "num_medusa_heads": "heads",
            "num_medusa_layers": "layers",
            "hidden_size": "hidden_size",
            "vocab_size": "vocabulary",
        },
        prefix="medusa_heads.",
    ),
    Layout(
        "vLLM's layout",
        rf"(?:medusa_heads\.)?blocks\.{_N}\.layers\.{_N}\.(weight|bias)",
        rf"(?:medusa_heads\.)?lm_heads\.{_N}\.weight",
        {
            "num_heads": "heads",
            "medusa_num_heads": "heads",
            "num_hidden_layers": "layers",
            "medusa_num_layers": "layers",
            "hidden_size": "hidden_size",
            "vocab_size": "vocabulary",
            "truncated_vocab_size": "draft_vocabulary",
        },
        shared_lm_head=r"(?:medusa_heads\.)?lm_head\.weight",
        draft_map=r"(?:medusa_heads\.)?token_map",
        biases=False,
    ),
)

OTHER_DRAFT_MODELS = {  # what the names of other kinds of draft model begin with
    "speculator.": "an MLP speculator (a recurrent state, not Medusa's ResBlocks on the hidden state)",
    "midlayer.": "an EAGLE draft model (a separate decoder layer)",
    "eagle_module.": "an EAGLE draft model (a separate decoder layer)",
}


def detect_layout(names: Collection[str], where: str) -> Layout:
    """Return the layout that the names of weights follow.

    Args:
        names: Names of all weights of one or several files.
        where: The file, for messages.

    Raises:
        HeadsError: They follow no layout, or two at once.
    """
    found = [layout for layout in LAYOUTS if any(re.fullmatch(layout.linear, name) for name in names)]
    if len(found) == 1:
        return found[0]
    if found:
        titles = " and ".join(layout.title for layout in found)
        raise HeadsError(f"{where}: its names follow {titles} at once; expected one. Keep one of the two")
    for start, kind in OTHER_DRAFT_MODELS.items():
        if any(name.startswith(start) for name in names):
            raise HeadsError(f"{where}: holds {kind}, which cannot be expressed as Medusa heads; give Medusa heads")
    examples = ", ".join(repr(name) for name in sorted(names)[:3]) or "nothing"
    raise HeadsError(
        f"{where}: contains no heads: got {examples}{' …' if len(names) > 3 else ''}, expected names such as "
        "'0.0.linear.weight' (the Medusa authors' layout), 'medusa_head.0.0.linear.weight', "
        "'medusa_heads.0.medusa_layers.0.linear.weight' or 'blocks.0.layers.0.weight'"
    )


def canonical_names(names: Collection[str], layout: Layout, where: str) -> dict[str, str | None]:
    """Map the authors' names to the stored names; `None` stands for a bias that is left out because it is zero.

    For example `medusa_head.0.1.linear.weight` of the v1.0 layout is mapped to by `0.1.linear.weight`. One stored
    lm_head may serve all heads. Names outside `layout.prefix` belong to the decoder and are ignored.

    Raises:
        HeadsError: The layout does not know a weight of the heads, or a weight is stored twice.
    """
    linears: dict[str, str] = {}
    owned: dict[tuple[int, int | None], str] = {}  # lm_heads by head and layer; None: after the last ResBlock
    shared: list[str] = []
    token_maps: list[str] = []
    further: dict[str, str] = {}
    for name in sorted(filter(layout.owns, names)):
        if match := re.fullmatch(layout.linear, name):
            _keep(linears, f"{match[1]}.{match[2]}.linear.{match[3]}", name, where)
        elif match := re.fullmatch(layout.lm_head, name):
            _keep(owned, (int(match[1]), int(match[2]) if match.lastindex == 2 else None), name, where)
        elif layout.shared_lm_head and re.fullmatch(layout.shared_lm_head, name):
            shared.append(name)
        elif layout.draft_map and re.fullmatch(layout.draft_map, name):
            token_maps.append(name)
        elif name in layout.further:
            further[name] = name
        else:
            raise HeadsError(
                f"{where}: unknown weight {name!r} among heads in {layout.title}; quantised or extended heads "
                "cannot be expressed as Medusa heads: give them unquantised and whole"
            )
    if len(token_maps) > 1 or len(shared) > 1 or (shared and owned):
        raise HeadsError(f"{where}: holds {token_maps + shared + sorted(owned.values())}; expected one of a kind")
    mapped: dict[str, str | None] = {**linears, **_lm_heads(linears, owned, shared, layout), **further}
    if token_maps:
        mapped[MAP_NAME] = token_maps[0]
    if not layout.biases and not any(name.endswith(".bias") for name in linears):
        mapped |= {name.removesuffix("weight") + "bias": None for name in linears}
    return mapped


def _lm_heads(
    linears: Collection[str], owned: Mapping[tuple[int, int | None], str], shared: list[str], layout: Layout
) -> dict[str, str]:
    """Name each head's lm_head as the authors do: with the number after the last ResBlock's."""
    heads = {int(name.split(".")[0]) for name in linears}
    layers = 1 + max((int(name.split(".")[1]) for name in linears), default=-1)
    if layout.shared_lm_head and list(owned) == [(0, None)]:  # the first one stands for all
        shared = list(owned.values())
    if shared:
        return {f"{head}.{layers}.weight": shared[0] for head in heads}
    return {f"{head}.{layers if layer is None else layer}.weight": name for (head, layer), name in owned.items()}


def _keep(into: dict[_Key, str], key: _Key, name: str, where: str) -> None:
    if key in into:
        raise HeadsError(f"{where}: {name!r} and {into[key]!r} name the same weight; expected one of them")
    into[key] = name
