"""Recorded ranks say exactly how many steps each tree takes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from medusa_exporter.bench.timing import Question, generate_timed
from medusa_exporter.calibration.head_ranks import (
    RankRecorder,
    largest_worth_recording,
    measure_acceptance,
    ranks_in_answer,
    recorded_ranks,
    recording_tree,
)
from medusa_profiles.catalogue import load_profile
from medusa_profiles.simulation import tokens_per_step
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import PromptError
from medusa_runtime.facts import HeadFacts

from ...calibrations import calibration
from ...runtime.fake_backend import FakeBackend


def test_ranks_are_those_of_the_tokens_that_followed():
    assert ranks_in_answer([[[9, 6]], [[8, 7]]], [5, 6, 7]).tolist() == [[1], [1]]
    assert ranks_in_answer([[[6], [7]], [[7], [1]]], [5, 6, 7]).tolist() == [[0, 0], [0, -1]]
    assert ranks_in_answer([], [5]).shape == (0, 0)


def test_the_recording_tree_has_every_candidate_once():
    tree = recording_tree((3, 2, 1))
    candidates = [(len(path), path[-1]) for path in tree.paths]
    assert sorted(candidates) == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0)]


@pytest.mark.parametrize(("times", "nodes"), [({2: 12, 8: 25, 16: 26, 32: 49}, 8), ({2: 40, 4: 45}, 2), ({}, 1)])
def test_candidates_are_recorded_for_trees_that_are_likely_to_pay(times, nodes):
    assert largest_worth_recording(calibration({1: 10.0, **times}), HeadFacts(4, 1, "none", 10)) == nodes


def test_larger_trees_record_more_candidates():
    heads = HeadFacts(4, 1, "none", 10)
    assert recorded_ranks(heads, 16) == (8, 4, 3, 2)
    assert recorded_ranks(heads, 2) == (1, 1, 1, 1)
    assert recorded_ranks(heads, 128) == (10, 10, 10, 10)


@pytest.mark.parametrize("name", ["tree-2", "tree-4", "tree-8", "chain-5"])
def test_simulated_steps_are_those_that_decoding_takes(name):
    tree, prompts = load_profile(name), [[1, 2, 3], [4, 5], [6]]
    recorder = RankRecorder(Decoder(FakeBackend(hit_rate=0.7, spread=2)), (6, 6, 6, 6, 6))
    for number, ids in enumerate(prompts, start=1):
        recorder.answer(Question(number, 1, tuple(ids), 60), 0)
    decoder = Decoder(FakeBackend(hit_rate=0.7, spread=2), tree)
    timed = [generate_timed(decoder, ids, 60) for ids in prompts]
    assert [len(one.hits) for one in recorder.answers] == [len(one.tokens) - 1 for one in timed]
    hits = np.concatenate([one.hits for one in recorder.answers])
    answers = np.repeat(np.arange(3), [len(one.hits) for one in recorder.answers])
    steps = sum(one.steps for one in timed)
    assert 1 < len(hits) / steps < 5
    assert tokens_per_step(tree, hits, answers) == pytest.approx(len(hits) / steps)
    pasts = [
        len(ids) + place for ids, one in zip(prompts, recorder.answers, strict=True) for place in range(len(one.hits))
    ]
    assert recorder.mean_past == pytest.approx(np.mean(pasts))


def test_the_end_of_the_context_has_no_drafts():
    recorder = RankRecorder(Decoder(FakeBackend(context=24)), (6, 6, 6, 6, 6))
    recorder.answer(Question(1, 1, (1, 2, 3), 60, stop_at_eos=False), 0)
    (one,) = recorder.answers
    assert (one.hits[-1] == -1).all()


def encoder(ids):
    return SimpleNamespace(
        has_chat_template=True, encode=lambda _messages: ids, tokenizer=SimpleNamespace(decode=lambda _ids: "x")
    )


def measured(prompts, limit=8, seen=None):
    return measure_acceptance(
        Decoder(FakeBackend(context=64)),
        encoder([1, 2]),
        prompts,
        (6, 6, 6, 6, 6),
        max_new_tokens=limit,
        first_only=False,
        report=(seen if seen is not None else []).append,
    )


def test_conversations_are_halved_and_not_their_turns():
    seen = []
    found = measured([("a", "b"), ("c",), ("d",)], seen=seen)
    assert [(one.conversation, one.check) for one in found.answers] == [(1, False), (1, False), (2, True), (3, False)]
    assert len(seen) == 4


def test_answers_without_a_step_are_refused():
    with pytest.raises(PromptError, match="no step was taken on the 1 prompts"):
        measured([("a",)], limit=1)
