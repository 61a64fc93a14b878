"""The supported families of decoders, and which backends and precisions each can be built for.

The check of a model, the choice of graphs and the README's support matrix all use this one table. Without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

HEAD_MULTIPLE = 8  # head sizes of ONNX Runtime's GroupQueryAttention are multiples of this
ACTIVATIONS = (  # of an MLP, by transformers' names, whose graphs were compared with transformers
    "silu",
    "swish",
    "gelu",
    "gelu_python",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "gelu_accurate",
    "quick_gelu",
    "relu",
    "relu2",
)


@dataclass(frozen=True)
class Family:
    """One family of decoders.

    Attributes:
        name: The name that people use.
        differs: What distinguishes the family from Llama.
        taps: Whether layers have a norm before their attention, so that heads may read a layer's input.
        ran: Backends on whose device a model of the family was run and compared. Graphs for the others were compared in
            ONNX Runtime on a CPU.
        attention: transformers' attention implementation that computes the model.
        refused: Why no graph is built, by backend and precision.
    """

    name: str
    differs: str = ""
    taps: bool = True
    ran: tuple[str, ...] = ("ort-cpu", "ort-cuda")
    attention: str = "sdpa"
    refused: Mapping[tuple[str, str], str] = field(default_factory=lambda: MappingProxyType({}))


FAMILIES: Mapping[str, Family] = MappingProxyType(  # by transformers' model type
    {
        "llama": Family("Llama", ran=("ort-cpu", "ort-cuda", "tensorrt")),
        "mistral": Family("Mistral", "sliding window"),
        "qwen2": Family("Qwen2", "biases"),
        "qwen3": Family("Qwen3", "RMS norms of queries and keys"),
        "smollm3": Family("SmolLM3", "no rotary embedding in some layers"),
        "olmo2": Family("OLMo 2", "norms after each block, norms of queries and keys; heads without taps", taps=False),
        "phi3": Family(
            "Phi-3, Phi-4",
            "partial rotary embedding; longrope up to where its factors change",
        ),
        "granite": Family("Granite 3", "multipliers for embeddings, attention scores, residual blocks and logits"),
        "cohere": Family("Cohere", "layer norms, parallel blocks, interleaved rotary embedding, logit scale"),
        "gpt_neox": Family(
            "GPT-NeoX, Pythia", "layer norms and biases, parallel blocks, GELU, partial rotary embedding"
        ),
        "gemma": Family("Gemma", "norms multiply by 1 + weight, scaled embedding, GELU"),
        "gemma2": Family(
            "Gemma 2",
            "as Gemma; soft-capped scores and logits, sliding window in every other layer, norms after blocks",
            attention="eager",  # the only one that caps attention scores; torch's fused attention does not
        ),
    }
)


@dataclass(frozen=True)
class DecoderConfig:
    """The part of a model's config that decides which graphs can be built.

    Attributes:
        family: A key of FAMILIES.
        head_dim: Number of elements of an attention head.
        activation: Activation function of the MLP, by transformers' name.
    """

    family: str
    head_dim: int
    activation: str

    def refusal(self, backend: str, precision: str) -> str | None:
        """Return why no graph can be built for a backend in a precision; None if one can."""
        if in_place_attention(backend, precision) and self.head_dim % HEAD_MULTIPLE:
            return (
                f"its heads have {self.head_dim} elements, and the attention of this backend and precision needs "
                f"multiples of {HEAD_MULTIPLE}"
            )
        return FAMILIES[self.family].refused.get((backend, precision))


def in_place_attention(backend: str, precision: str) -> bool:
    """Return whether ONNX Runtime's GroupQueryAttention writes keys and values in place."""
    return backend == "ort-cpu" or (backend == "ort-cuda" and precision != "fp32")


def support_table(precisions: Mapping[str, Sequence[str]]) -> str:
    """Return the README's support matrix as Markdown: run, built or refused, by family and backend.

    Args:
        precisions: The precisions of each backend.
    """
    lines = [["model family", *(f"`{backend}` {', '.join(kinds)}" for backend, kinds in precisions.items())]]
    for family in FAMILIES.values():
        lines.append([family.name, *(_state(family, backend, kinds) for backend, kinds in precisions.items())])
    return _markdown(lines)


def differences_table() -> str:
    """Return a Markdown table of each family's model type and of what distinguishes the family from Llama."""
    rows = [[f"`{model_type}`", family.name, family.differs] for model_type, family in FAMILIES.items()]
    return _markdown([["model type", "family", "unlike Llama"], *rows])


def _markdown(lines: list[list[str]]) -> str:
    header, *rows = lines
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def _state(family: Family, backend: str, kinds: Sequence[str]) -> str:
    refused = [kind for kind in kinds if (backend, kind) in family.refused]
    if len(refused) == len(kinds):
        return "refused"
    return ("run" if backend in family.ran else "built") + (f"; {', '.join(refused)} refused" if refused else "")
