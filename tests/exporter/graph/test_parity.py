"""The graph against transformers: prefill, random trees, both conditionings, ragged batches, garbage in unused rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from medusa_profiles.profile import TreeProfile
from medusa_runtime import contract

from .conftest import HEADS, TOP_K, Traced

TOLERANCE = 2e-4  # on logits of order 10, fp32


def random_tree(rng: np.random.Generator, nodes: int) -> TreeProfile:
    paths: list[tuple[int, ...]] = []
    while len(paths) < nodes - 1:
        parent = () if not paths or rng.random() < 0.4 else paths[rng.integers(len(paths))]
        path = (*parent, int(rng.integers(TOP_K)))
        if len(path) <= HEADS and path not in paths:
            paths.append(path)
    return TreeProfile("random", tuple(paths))


def prefill(traced: Traced, prompts: list[list[int]], P: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Prefill ragged prompts together, padded on the right, over P rows of garbage that past_length hides."""
    B, T = len(prompts), max(map(len, prompts))
    ids = np.zeros((B, T), np.int32)
    mask = np.zeros((B, T, T), bool)
    for b, prompt in enumerate(prompts):
        ids[b, : len(prompt)] = prompt
        mask[b] = np.tri(T, dtype=bool)
        mask[b, :, len(prompt) :] &= np.eye(T, dtype=bool)[:, len(prompt) :]
    return traced.run(
        input_ids=ids,
        position_ids=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy(),
        tree_mask=mask,
        past_length=np.zeros(B, np.int32),
        draft_hidden=np.zeros((0, traced.heads.input_size), np.float32),
        logit_rows=np.array([[len(prompt) - 1] for prompt in prompts], np.int32),
        **traced.past(P, B, rng),
    )


def keep(
    traced: Traced, prompts: list[list[int]], done: dict[str, np.ndarray], P: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return a past of P rows that begins with a prefill's real rows and is garbage behind them."""
    past = traced.past(P, len(prompts), rng)
    for name, array in past.items():
        for b, prompt in enumerate(prompts):
            array[b, : len(prompt)] = done[name.replace("past", "new")][b, : len(prompt)]
    return past


def prompts_of(rng: np.random.Generator, lengths: list[int], vocab: int) -> list[list[int]]:
    return [rng.integers(0, vocab, size=length).tolist() for length in lengths]


@pytest.mark.parametrize(("lengths", "P"), [([11], 0), ([11], 5), ([4, 13, 9], 0), ([9, 1, 12], 6)])
def test_prefill(traced: Traced, lengths: list[int], P: int) -> None:
    rng = np.random.default_rng(len(lengths) + P)
    prompts = prompts_of(rng, lengths, traced.facts.vocab_size)
    done = prefill(traced, prompts, P, rng)
    for b, prompt in enumerate(prompts):
        logits, hidden = traced.logits(prompt)
        np.testing.assert_allclose(done["logits"][b, 0], logits, atol=TOLERANCE)
        np.testing.assert_allclose(done["hidden"][b, len(prompt) - 1], hidden, atol=TOLERANCE)
        assert done["argmax"][b, 0] == logits.argmax()
        np.testing.assert_array_equal(done["tokens"][b, : len(prompt)], prompt)


@pytest.mark.parametrize("lengths", [[10], [3, 14, 8]])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_node_equals_the_model_on_its_own_path(traced: Traced, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    B, P = len(lengths), max(lengths) + (0 if len(lengths) == 1 else 4)
    prompts = prompts_of(rng, lengths, traced.facts.vocab_size)
    past = keep(traced, prompts, prefill(traced, prompts, 0, rng), P, rng)
    tree = random_tree(rng, 9)
    tokens = rng.integers(0, traced.facts.vocab_size, size=(B, tree.size)).astype(np.int32)
    rows = np.stack([rng.permutation(tree.size) for _ in range(B)]).astype(np.int32)
    past_length = np.array(lengths, np.int32)
    done = traced.run(
        input_ids=tokens,
        position_ids=past_length[:, None] + tree.depths[None],
        tree_mask=np.broadcast_to(tree.mask, (B, tree.size, tree.size)).copy(),
        past_length=past_length,
        draft_hidden=np.zeros((0, traced.heads.input_size), np.float32),
        logit_rows=rows,
        **past,
    )
    for b in range(B):
        for column, node in enumerate(rows[b]):
            path = tokens[b, tree.mask[node]].tolist()
            logits, hidden = traced.logits(prompts[b] + path)
            np.testing.assert_allclose(done["logits"][b, column], logits, atol=TOLERANCE)
            np.testing.assert_allclose(done["hidden"][b, node], hidden, atol=TOLERANCE)
            assert done["argmax"][b, column] == done["logits"][b, column].argmax()


@pytest.mark.parametrize("lengths", [[6], [5, 2, 9]])
def test_candidate_ids_become_the_tokens_that_the_heads_propose(traced: Traced, lengths: list[int]) -> None:
    rng = np.random.default_rng(7)
    B = len(lengths)
    prompts = prompts_of(rng, lengths, traced.facts.vocab_size)
    past = keep(traced, prompts, prefill(traced, prompts, 0, rng), max(lengths) + 3, rng)
    drafts = np.stack([traced.logits(prompt)[1] for prompt in prompts])
    roots = np.array([traced.logits(prompt)[0].argmax() for prompt in prompts])
    with torch.no_grad():
        proposed = traced.heads.propose(
            torch.tensor(drafts),
            traced.model.get_input_embeddings()(torch.tensor(roots)),
            traced.lm_head,
            TOP_K,
        ).numpy()
    if traced.heads.token_map is not None:
        assert set(proposed.ravel().tolist()) <= set(traced.heads.token_map.tolist())
    everything = TreeProfile(
        "all", tuple((0,) * (depth - 1) + (rank,) for depth in range(1, HEADS + 1) for rank in range(TOP_K))
    )
    ids = np.broadcast_to(everything.candidate_ids(TOP_K), (B, everything.size)).copy()
    ids[:, 0] = roots
    done = traced.run(
        input_ids=ids,
        position_ids=np.array(lengths, np.int32)[:, None] + everything.depths[None],
        tree_mask=np.broadcast_to(everything.mask, (B, everything.size, everything.size)).copy(),
        past_length=np.array(lengths, np.int32),
        draft_hidden=drafts,
        logit_rows=np.broadcast_to(np.arange(everything.size, dtype=np.int32), (B, everything.size)).copy(),
        **past,
    )
    for b in range(B):
        assert done["tokens"][b, 0] == roots[b]
        for node in range(1, everything.size):
            head, rank = everything.heads[node], everything.ranks[node]
            assert done["tokens"][b, node] == proposed[b, head, rank], (head, rank)
            if rank == 0:  # the decoder has verified that token, not the candidate's id
                path = done["tokens"][b, everything.mask[node]].tolist()
                np.testing.assert_allclose(done["logits"][b, node], traced.logits(prompts[b] + path)[0], atol=TOLERANCE)


def test_inputs_and_outputs_match_the_contract(traced: Traced) -> None:
    facts = traced.facts
    inputs = contract.input_specs(facts.layers, traced.heads.input_size, facts.kv_row)
    outputs = contract.output_specs(facts.layers, traced.heads.input_size, facts.vocab_size, facts.kv_row)
    for values, specs in ((traced.session.get_inputs(), inputs), (traced.session.get_outputs(), outputs)):
        assert [(value.name, tuple(value.shape)) for value in values] == [(spec.name, spec.shape) for spec in specs]
