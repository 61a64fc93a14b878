"""Both sides run the same steps on the same KV cache, checked with a toy backend that verifies every row it gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from medusa_exporter.compare.steps import BackendRunner, ComparisonPlan, ReferenceStep, run_steps
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends.base import PREFILL_CHUNK
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import CapacityError

from ...runtime.fake_backend import EOS, FakeBackend, plain_answer

TREE = TreeProfile("tree", ((0,), (1,), (0, 0), (0, 1), (0, 0, 0)))
PROMPTS = ((3, 1, 4, 1, 5), tuple(n % 31 for n in range(PREFILL_CHUNK + 20)))


def plan(stop_ids: tuple[int, ...] = (), prompts: Any = PROMPTS, steps: int = 6) -> ComparisonPlan:
    return ComparisonPlan(prompts, TREE, steps, stop_ids)


def replayed(
    reference: FakeBackend, other: FakeBackend, what: ComparisonPlan
) -> list[tuple[ReferenceStep, dict[str, np.ndarray]]]:
    """Every step with what the other side gave; the pasts are compared before each."""
    first, second = (BackendRunner(Decoder(backend), what) for backend in (reference, other))
    found = []
    for step in run_steps(first, what, reference.heads.top_k):
        length = step.inputs.length
        np.testing.assert_array_equal(reference.tokens[0, :length], other.tokens[0, :length])
        np.testing.assert_array_equal(reference.contexts[0, :length], other.contexts[0, :length])
        found.append((step, second.replay(step)))
    assert reference.committed == other.committed
    return found


def test_one_backend_against_itself_gives_the_same_at_every_step() -> None:
    found = replayed(FakeBackend(hit_rate=0.7, spread=2), FakeBackend(hit_rate=0.7, spread=2), plan())
    kinds = [step.inputs.kind for step, _ in found]
    assert kinds == ["prefill", *["plain", "tree"] * 6, "prefill", "prefill", *["plain", "tree"] * 6]
    assert [step.inputs.step for step, _ in found[-4:]] == [5, 5, 6, 6]
    for step, got in found:
        assert list(got) == list(step.outputs)
        for name, array in step.outputs.items():
            np.testing.assert_array_equal(array, got[name])


def test_the_reference_decodes_what_plain_decoding_does() -> None:
    reference = FakeBackend(hit_rate=0.7, spread=2)
    answers: dict[int, list[int]] = {}
    for step, _ in replayed(reference, FakeBackend(), plan()):
        if step.inputs.kind == "tree":
            answers.setdefault(step.inputs.prompt, []).extend(step.outputs["tokens"][0, step.path].tolist())
    assert len(answers[1]) > 8  # paths of several nodes were kept
    for number, answer in answers.items():
        assert answer == plain_answer(PROMPTS[number - 1], len(answer), (), 4096)[0]


def test_other_candidates_show_in_the_tokens_and_nowhere_else() -> None:
    found = replayed(FakeBackend(hit_rate=1.0), FakeBackend(hit_rate=0.0), plan())
    trees = [(step, got) for step, got in found if step.inputs.kind == "tree"]
    assert any(len(step.path) > 1 for step, _ in trees)
    for step, got in found:
        differing = [name for name, array in step.outputs.items() if not np.array_equal(array, got[name])]
        assert differing == (["tokens"] if step.inputs.kind == "tree" else [])


def test_the_summaries_of_either_side_are_compared_with_its_own_logits() -> None:
    for summaries in (False, True):
        runner = BackendRunner(Decoder(FakeBackend(summaries=summaries)), plan())
        errors = {step.summary_error for step in run_steps(runner, plan(), 6)}
        assert errors == ({None} if not summaries else errors - {None})
        assert all(error is None or error < 1e-6 for error in errors)
    other = FakeBackend(summaries=True)
    read = other.read_summary
    other.read_summary = lambda row, sequence=0: read(row, sequence)._replace(finite=row != 2)
    second, found = BackendRunner(Decoder(other), plan()), []
    for step in run_steps(BackendRunner(Decoder(FakeBackend()), plan()), plan(), 6):
        second.replay(step)
        assert step.summary_error is None
        found.append((step.inputs.kind, second.summary_error))
    assert {kind for kind, error in found if error == np.inf} == {"tree"}  # the only steps with a row 2


def test_nothing_is_decoded_behind_a_stop_token() -> None:
    reference = FakeBackend()
    answer, why = plain_answer(PROMPTS[0], 100, (EOS,), 4096)
    assert why == "stop"
    steps = [step for step, _ in replayed(reference, FakeBackend(), plan((EOS,), PROMPTS[:1], 100))]
    kept = [token for step in steps if step.inputs.kind == "tree" for token in step.outputs["tokens"][0, step.path]]
    assert len(answer) - 1 <= len(kept) <= len(answer) + TREE.depth
    at_once = plan((plain_answer(PROMPTS[0], 1, (), 4096)[0][0],), PROMPTS[:1])
    assert [step.inputs.kind for step, _ in replayed(FakeBackend(), FakeBackend(), at_once)] == ["prefill"]


def test_a_plan_that_does_not_fit_is_refused_before_it_is_run() -> None:
    what = plan(prompts=((1, 2, 3),))
    assert what.cache_rows == 3 + 6 * 4 + 6
    backend = FakeBackend(context=what.cache_rows)
    assert len(list(run_steps(BackendRunner(Decoder(backend), what), what, backend.heads.top_k))) == 13
    small = FakeBackend(context=what.cache_rows - 1)
    with pytest.raises(CapacityError, match=r"up to 33 tokens, fake has a context of 32; .* fewer --steps"):
        BackendRunner(Decoder(small), what)
    assert not small.steps
