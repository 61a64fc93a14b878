"""Records what the PyTorch model computes for a few short steps, before it is traced; each graph is compared with it.

Only transformers' own forward pass over whole sequences is used: its masks, its cache, its rotary embedding. A node of
a tree is the last token of the sequence from the root to it. So nothing that is under test takes part.

Shapes: n tokens of a step, P rows of its past, L layers, W elements of a token's keys in a layer, E elements of the
heads' input for a token, V tokens of the vocabulary, K heads, D tokens that the heads score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from medusa_profiles.profile import TreeProfile
from transformers import DynamicCache

from medusa_exporter.heads.taps import capture_taps
from medusa_exporter.validation.finite import check_finite
from medusa_exporter.validation.steps import FloatArray, IntArray, Past, RecordedDraft, RecordedStep, Recording, Rows

if TYPE_CHECKING:
    from medusa_runtime.facts import ModelFacts

    from medusa_exporter.heads.modules import MedusaHeads

PROMPT = 16  # tokens before the plain step and the tree step
VALIDATION_TREE = TreeProfile(
    "validation", ((0,), (1,), (0, 0))
)  # of the tree step: a root, two children, one of which has a child
MAX_VALIDATED_WINDOW = 256  # a step goes beyond sliding windows up to this length
HIDDEN_ROWS = 8  # rows that such a window hides in that step
FAR_PAST = 2  # rows of the past before far positions; without a past, a CPU's operator uses positions 0, 1, …
TEXT = (
    "The harbour opens at six. Before that, 12 boats wait outside the wall, and nobody on them says much: they drink "
    "tea, count the nets, and look at the sky. What do they see there? Rain, mostly; sometimes a line of light."
)


def text_ids(tokenizer: Any, vocab_size: int, count: int) -> list[int]:
    """Return `count` token ids below `vocab_size` of an English text, repeated as often as necessary."""
    ids = [token for token in tokenizer.encode(TEXT, add_special_tokens=False) if token < vocab_size]
    found: list[int] = np.resize(np.array(ids or range(min(vocab_size, count)), np.int32), count).tolist()
    return found


def record_reference(model: Any, heads: MedusaHeads | None, facts: ModelFacts, tokenizer: Any) -> Recording:
    """Run the model over a short prompt, a plain step, a tree, far positions and, if it is short, beyond its window.

    Args:
        model: The decoder as loaded, before `trace` replaces its attention.
        heads: The Medusa heads, None for none.
        facts: Facts about the decoder; the context must be 8 tokens or more.
        tokenizer: The model's tokenizer.

    Raises:
        UnsupportedModelError: If the model computes values that are not finite.
    """
    window = _reachable_window(model.config, facts.context)
    prompt = min(PROMPT, facts.context - VALIDATION_TREE.depth - 2)
    length = 0 if window is None else min(window + HIDDEN_ROWS, facts.context - 1)
    ids = text_ids(tokenizer, facts.vocab_size, max(prompt + VALIDATION_TREE.size, length + 1))
    with _eager(model), torch.no_grad():
        steps, draft = _near_steps(model, heads, np.array(ids, np.int32), prompt)
        if window is not None:
            steps.append(_step_beyond_window(model, heads, np.array(ids[: length + 1], np.int32)))
        steps.append(
            _far_step(model, heads, facts.context, np.array(ids, np.int32), whole=not _has_window(model.config))
        )
    return check_finite(Recording(tuple(steps), draft), facts.name)


def _near_steps(
    model: Any, heads: MedusaHeads | None, ids: IntArray, prompt: int
) -> tuple[list[RecordedStep], RecordedDraft | None]:
    """Record the prompt, a plain step and a tree step; the tree's paths are sequences of a batch, padded at the end.

    With heads, their draft behind the prompt is recorded as well.
    """
    leaves = [node for node in range(VALIDATION_TREE.size) if not VALIDATION_TREE.children[node]]
    nodes = ids[prompt : prompt + VALIDATION_TREE.size]
    paths = [np.flatnonzero(VALIDATION_TREE.mask[leaf]) for leaf in leaves]
    length = prompt + max(map(len, paths))
    sequences = np.stack([np.resize(np.concatenate((ids[:prompt], nodes[path])), length) for path in paths])
    found = _forward(model, heads, sequences)
    first = found[0]
    past = Past(first.keys[:, :prompt], first.values[:, :prompt])
    ends = {node: leaf for leaf, path in enumerate(paths) for node in path.tolist()}  # a sequence through each node
    rows = (VALIDATION_TREE.depths + prompt).tolist()
    tree = _concatenate(
        [found[ends[node]].take(slice(rows[node], rows[node] + 1)) for node in range(VALIDATION_TREE.size)]
    )
    nothing = Past(first.keys[:, :0], first.values[:, :0])
    every = np.arange(prompt, dtype=np.int32)
    steps = [
        RecordedStep(
            "prefill", ids[:prompt], every, np.tri(prompt, dtype=np.bool_), nothing, first.take(slice(0, prompt))
        ),
        RecordedStep("plain", nodes[:1], every[:1] + prompt, np.eye(1, dtype=np.bool_), past, tree.take(slice(0, 1))),
        RecordedStep("tree", nodes, np.array(rows, np.int32), VALIDATION_TREE.mask, past, tree),
    ]
    draft = None if heads is None else _draft(model, heads, int(nodes[0]), first.hidden[prompt - 1], past)
    return steps, draft


def _step_beyond_window(model: Any, heads: MedusaHeads | None, ids: IntArray) -> RecordedStep:
    """Record a step of one token after so many that some of them are outside the window."""
    last = len(ids) - 1
    [found] = _forward(model, heads, ids[None], logits_to_keep=1)
    past = Past(found.keys[:, :last], found.values[:, :last])
    expected = Rows(found.keys[:, last:], found.values[:, last:], found.hidden[-1:], found.logits[-1:])
    at = np.array([last], np.int32)
    return RecordedStep("window", ids[last:], at, np.eye(1, dtype=np.bool_), past, expected)


def _far_step(model: Any, heads: MedusaHeads | None, context: int, ids: IntArray, *, whole: bool) -> RecordedStep:
    """Record a step of independent tokens after a short past, at positions where rotary tables may be wrong.

    Args:
        model: The decoder.
        heads: The Medusa heads, None for none.
        context: Number of tokens of the bundle's context.
        ids: Token ids.
        whole: Whether everything is compared, and not only the first layer's keys and values, which depend on no mask:
            a graph counts a window in positions, transformers counts it in tokens.
    """
    positions = np.array(far_positions(model.config, context), np.int32)
    n, first = len(positions), np.arange(FAR_PAST, dtype=np.int32)
    tokens = np.resize(ids[FAR_PAST:], n)
    sequences = np.concatenate((np.repeat(ids[None, :FAR_PAST], n, axis=0), tokens[:, None]), axis=1)
    places = np.concatenate((np.repeat(first[None], n, axis=0), positions[:, None]), axis=1)
    found = _forward(model, heads, sequences, places)
    expected = _concatenate([one.take(slice(FAR_PAST, None)) for one in found])
    past = Past(found[0].keys[:, :FAR_PAST], found[0].values[:, :FAR_PAST])
    step = RecordedStep("rope", tokens, positions, np.eye(n, dtype=np.bool_), past, expected, far=True)
    return step if whole else step.first_layer()


def far_positions(config: Any, context: int) -> list[int]:
    """Return the first, middle and last position of a context, and those around the length before rotary scaling."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original = rope.get("original_max_position_embeddings") if isinstance(rope, dict) else None
    original = original or getattr(config, "original_max_position_embeddings", None)
    around = [original - 1, original, original + 1] if isinstance(original, int) else []
    return sorted({at for at in (0, context // 2, *around, context - 1) if 0 <= at < context})


def _forward(
    model: Any,
    heads: MedusaHeads | None,
    ids: IntArray,
    positions: IntArray | None = None,
    logits_to_keep: int = 0,
) -> list[Rows]:
    """Run sequences with causal attention.

    Args:
        model: The decoder.
        heads: The Medusa heads, None for none.
        ids: Token ids, (B, n).
        positions: Positions, (B, n); None for 0, 1, ….
        logits_to_keep: Number of the last tokens whose logits and final hidden states are kept; 0 for all.

    Returns:
        The rows of each sequence.
    """
    kept: list[torch.Tensor] = []

    def keep(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        kept.append(arguments[0])

    cache = DynamicCache()
    more: dict[str, Any] = {}
    if positions is not None:
        more["position_ids"] = torch.from_numpy(positions.astype(np.int64))
    if logits_to_keep:
        more["logits_to_keep"] = logits_to_keep
    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    taps = () if heads is None else heads.taps
    with hook, capture_taps(model, taps) as caught:
        tokens = torch.from_numpy(ids.astype(np.int64))
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, **more).logits
    last = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
    hidden = torch.cat((kept[0], *(caught[layer][:, last] for layer in taps)), dim=-1)
    keys, values = (
        np.stack([_rows(getattr(layer, part)) for layer in cache.layers], axis=1) for part in ("keys", "values")
    )
    return [Rows(*of_one) for of_one in zip(keys, values, hidden.float().numpy(), logits.float().numpy(), strict=True)]


def _rows(heads_first: torch.Tensor) -> FloatArray:
    """(B, heads, n, head_dim) -> (B, n, W)."""
    rows: FloatArray = heads_first.transpose(1, 2).flatten(2).float().numpy()
    return rows


def _concatenate(rows: Sequence[Rows]) -> Rows:
    return Rows(
        np.concatenate([one.keys for one in rows], axis=1),
        np.concatenate([one.values for one in rows], axis=1),
        np.concatenate([one.hidden for one in rows]),
        np.concatenate([one.logits for one in rows]),
    )


def _draft(model: Any, heads: MedusaHeads, root: int, hidden: FloatArray, past: Past) -> RecordedDraft:
    lm_head = model.get_output_embeddings()
    chosen = slice(None) if heads.token_map is None else heads.token_map
    weight, bias = lm_head.weight[chosen], None if lm_head.bias is None else lm_head.bias[chosen]
    embedding = model.get_input_embeddings()(torch.tensor([root]))
    features = heads.features(torch.from_numpy(hidden[None]), embedding)
    logits = heads.logits(features, lambda rows: torch.nn.functional.linear(rows, weight, bias))[:, 0]
    tokens = torch.arange(logits.shape[-1]) if heads.token_map is None else heads.token_map
    return RecordedDraft(root, hidden, past, logits.float().numpy(), tokens.numpy().astype(np.int32))


def _has_window(config: Any) -> bool:
    return bool(getattr(config, "sliding_window", None)) and bool(getattr(config, "use_sliding_window", True))


def _reachable_window(config: Any, context: int) -> int | None:
    """Return the length of the sliding window, if the context is longer and a step beyond it is cheap; else None."""
    window = int(config.sliding_window) if _has_window(config) else 0
    return window if 0 < window <= MAX_VALIDATED_WINDOW and window < context else None


def unvalidated_window(config: Any, context: int) -> int | None:
    """Return the length of a sliding window that no step goes beyond, as that takes too long; None if there is none."""
    window = int(config.sliding_window) if _has_window(config) else 0
    return window if MAX_VALIDATED_WINDOW < window < context else None


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Let transformers use eager attention, the definition of every family, while the block runs."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
