"""Forced acceptance: which recordings are read, which are refused, and which paths are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.bench.forced_acceptance import ForcedAcceptance, RecordedAcceptance
from medusa_exporter.bench.timing import Question, TimedDecoder
from medusa_profiles.profile import TreeProfile
from medusa_runtime.accept import greedy
from medusa_runtime.errors import MedusaError
from medusa_runtime.loading import load_bundle

BUSHY = TreeProfile("bushy", ((0,), (1,), (1, 0), (1, 0, 0)))  # the first node of depth 2 is not on the rank-0 chain


def content(**changes: Any) -> dict[str, Any]:
    result = {"backend": "ort-cpu", "profile": "bushy", "nodes": 5, "tokens_added_by_steps": [[3, 1, 2], [1, 4, 1]]}
    return {
        "schema": 2,
        "bundle": {"model": "real"},
        "settings": {"accept": "greedy"},
        "results": [result | changes, {**result, "backend": "other", "tokens_added_by_steps": [[2, 2]]}],
    }


def write(file: Path, what: object) -> Path:
    file.write_text(json.dumps(what))
    return file


def test_the_last_step_of_each_answer_is_left_out(tmp_path: Path) -> None:
    recording = RecordedAcceptance.read(write(tmp_path / "real.json", content()), [BUSHY])
    assert (recording.source, recording.model) == ("real.json", "real")
    assert recording.kept == {"bushy": ((3, 1), (1, 4))}


def test_each_answer_begins_with_another_recorded_answer(tmp_path: Path) -> None:
    recording = RecordedAcceptance.read(write(tmp_path / "real.json", content()), [BUSHY])
    for number, expected in ((0, [3, 1, 1, 4, 3]), (1, [1, 4, 3, 1, 1]), (2, [3, 1, 1, 4, 3])):
        rule = recording.rule("bushy", number)
        paths = [rule(BUSHY, [0] * 5, [10, 11, 12, 13, 14], None)[0] for _ in range(5)]  # type: ignore[arg-type]
        assert [len(path) for path in paths] == expected


def test_the_first_node_of_a_depth_is_kept_with_its_ancestors() -> None:
    rule = ForcedAcceptance([1, 2, 3, 4])
    argmax = [10, 11, 12, 13, 14]
    found = [rule(BUSHY, [0] * 5, argmax, None) for _ in range(5)]  # type: ignore[arg-type]
    assert found == [([0], 10), ([0, 1], 11), ([0, 2, 3], 13), ([0, 2, 3, 4], 14), ([0], 10)]
    plain = TreeProfile.plain()
    assert rule(plain, [0], [7], None) == greedy(plain, [0], [7])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ([], "is not a JSON file of medusa-export bench"),
        ({"results": []}, "is not a JSON file of medusa-export bench"),
        (content(profile="oak"), None),
        ({**content(), "schema": 1}, "has schema 1, expected 2; record it with: medusa-export bench"),
        ({**content(), "settings": {"accept": "forced"}}, "has the acceptance rule 'forced', expected 'greedy'"),
        ({**content(), "results": []}, "has no profile 'bushy', it has none; record it with"),
        (content(nodes=8), "has another tree under the name 'bushy'"),
        (content(tokens_added_by_steps=[[5, 1]]), "has another tree under the name"),
        (content(tokens_added_by_steps=[[True, 1]]), "has another tree under the name"),
        (content(tokens_added_by_steps=[[3], []]), "has no complete step"),
        (content(tokens_added_by_steps=None), "lacks the tokens that its steps added"),
    ],
)
def test_unsuitable_recordings_are_refused(tmp_path: Path, what: object, words: str | None) -> None:
    file = write(tmp_path / "real.json", what)
    if words is None:  # another backend has it
        assert RecordedAcceptance.read(file, [BUSHY]).kept == {"bushy": ((2,),)}
        return
    with pytest.raises(MedusaError, match=words):
        RecordedAcceptance.read(file, [BUSHY])


def test_a_timed_decoder_keeps_the_recorded_tokens(tiny_bundle: Path) -> None:
    loaded = load_bundle(tiny_bundle, profile="plain", threads=1)
    tree = loaded.bundle.profile("tree-8")
    recording = RecordedAcceptance("real.json", "real", {"tree-8": ((2, 1, 3), (1, 1))})
    runner = TimedDecoder(loaded.decoder, [tree], recording)
    turn = runner.answer(Question(1, 1, tuple(loaded.prompt_encoder.encode("Hello")), 12, stop_at_eos=False), 0)
    assert turn is not None
    assert turn.plain.kept == (1,) * 11
    assert turn.trees["tree-8"].kept == (2, 1, 3, 1, 1, 2, 1)  # the last one cut by the answer's end
    assert turn.differences == {}
    assert loaded.decoder.accept is greedy
