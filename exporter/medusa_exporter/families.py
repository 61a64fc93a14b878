"""The families of decoders that are served, and which backend builds each one in which precision.

One table decides: the check of a model, the choice of graphs and the README read it. Without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

HEAD_MULTIPLE = 8  # of head sizes that ONNX Runtime's GroupQueryAttention takes
ACTIVATIONS = (  # of an MLP, by transformers' names; those whose graphs were compared with transformers
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

    name: as people call it. differs: in what it is unlike Llama. taps: whether layers have a norm in front of their
    attention, whose rows heads may see. ran: backends on whose device a model of the family
    was run and compared; graphs for the others were compared in ONNX Runtime on a CPU. attention: which of
    transformers' computes the model. refused: by backend and precision, why no graph is built.
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
            attention="eager",  # whose scores are bounded; the fused ones of torch bound none
        ),
    }
)


@dataclass(frozen=True)
class Decoder:
    """What a model's config says that decides which graphs can be made of it.

    family: a key of FAMILIES. head_dim: elements of a head. activation: of the MLP, transformers' name.
    """

    family: str
    head_dim: int
    activation: str

    def refusal(self, backend: str, precision: str) -> str | None:
        """Say why no graph is built for a backend in a precision; None where one is."""
        if in_place_attention(backend, precision) and self.head_dim % HEAD_MULTIPLE:
            return (
                f"its heads have {self.head_dim} elements, and the attention of this backend and precision takes "
                f"multiples of {HEAD_MULTIPLE}"
            )
        return FAMILIES[self.family].refused.get((backend, precision))


def in_place_attention(backend: str, precision: str) -> bool:
    """Whether keys and values are written where they stay, by ONNX Runtime's GroupQueryAttention."""
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
