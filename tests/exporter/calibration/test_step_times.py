"""Step times: what is timed, in which order, for how long, and which sizes are left out."""

from __future__ import annotations

from itertools import pairwise

import pytest
from medusa_exporter.calibration import step_times
from medusa_exporter.calibration.step_times import choose_pasts, measure_step_times, usual_tree
from medusa_profiles.profile import TreeProfile
from medusa_runtime.errors import BusyError, CapacityError, InvalidLogitsError, MedusaError
from medusa_runtime.facts import HeadFacts
from medusa_runtime.kv_cache import KvCache

from ...runtime.fake_backend import FakeBackend

TEXT = list(range(1, 31)) * 40


class Clocked(FakeBackend):
    """Every step takes 10 ms and 1 ms for each row and 1 ms for 100 rows of the past, on a clock of its own."""

    def __init__(self, monkeypatch, **options):
        super().__init__(**options)
        self.now, self.order, self.broken = 0.0, [], False
        self.most, self.per_row = 1000, 1.0
        monkeypatch.setattr(step_times, "perf_counter", lambda: self.now)

    def _check(self, step):
        """The past has no content here."""

    def propose(self, *_state):
        return super().propose(0, 0, 0)

    def run(self, step):
        nodes, past = step.input_ids.shape[1], int(step.past_length[0])
        if nodes > 1 and not step.draft and (self.heads.count or nodes > 16):  # the text
            super().run(step)
            return
        if nodes > self.most:
            raise CapacityError("no engine fits")
        assert step.draft is (nodes > 1 and self.heads.count > 0)
        self.hidden = [(0, 0, 0)]
        self.order.append((nodes, past))
        self.now += 1e-3 * (10 + self.per_row * (nodes - 1) + past // 100)
        super().run(step)

    def read_logits(self, row, sequence=0):
        found = super().read_logits(row, sequence)
        return found * float("nan") if self.broken else found


@pytest.fixture
def backend(monkeypatch):
    return Clocked(monkeypatch)


def test_without_heads_steps_of_several_nodes_verify_literals(backend):
    backend.heads = HeadFacts.none()
    found = measure_step_times(backend, (1, 2, 8, 16), TEXT, 5.0)
    assert {one.nodes for one in found} == {1, 2, 8, 16}
    backend.per_row = 1000.0  # a step of two nodes takes more than two plain ones
    assert {one.nodes for one in measure_step_times(backend, (1, 2, 8), TEXT, 5.0)} == {1}


def test_every_size_is_timed_behind_every_past(backend):
    found = measure_step_times(backend, (1, 2, 4, 8), TEXT, 5.0)
    assert {(one.nodes, one.past) for one in found} == {(n, p) for n in (1, 2, 4, 8) for p in (64, 256, 1024)}
    for one in found:
        assert one.ms == pytest.approx(10 + one.nodes - 1 + one.past // 100)
        assert (one.batch, one.spread_ms) == (1, 0.0)
        assert one.runs >= 9  # three rounds, three steps each


def test_a_step_is_committed_as_decoding_does(backend):
    measure_step_times(backend, (1, 4), TEXT, 0.0)
    assert {tuple(path) for path in backend.committed if len(path) < 3} == {(0,), (0, 1)}
    assert set(backend.read_rows) == {0, 1}


def test_every_step_has_other_data(backend):
    roots = []
    run = backend.run
    backend.run = lambda step: (roots.append(int(step.input_ids[0, 0])), run(step))
    measure_step_times(backend, (1, 4), TEXT, 0.0)
    assert len(set(roots)) > 5


def test_the_sizes_take_turns(backend):
    measure_step_times(backend, (1, 2, 4), TEXT, 12.0)
    visits = [two for one, two in pairwise(backend.order) if one != two]
    counts = {cell: visits.count(cell) for cell in visits}
    assert max(counts.values()) - min(counts.values()) <= 2
    assert min(counts.values()) > 3


def test_steps_behind_another_size_are_not_timed_at_once(backend):
    """The processor settles: here a step takes twice as long in the first 0.1 seconds behind one of another size."""
    run, last = backend.run, {"cell": None, "since": 0.0}

    def unsettled(step):
        cell = step.input_ids.shape[1]
        if cell != last["cell"]:
            last.update(cell=cell, since=backend.now)
        before, settled = backend.now, backend.now - last["since"] > 0.1
        run(step)
        backend.now += 0.0 if settled else backend.now - before

    backend.run = unsettled
    for one in measure_step_times(backend, (1, 4), TEXT, 0.0):
        assert one.ms == pytest.approx(10 + one.nodes - 1 + one.past // 100)


def test_it_ends_in_time_but_not_before_three_rounds(backend):
    spent = []
    measure_step_times(backend, (1, 2, 4), TEXT, 12.0, spent.append)
    assert 9 < backend.now <= 12
    assert sum(spent) == pytest.approx(backend.now)
    before = backend.now
    del backend.order[:]
    measure_step_times(backend, (1, 2), TEXT, 0.0)
    assert min(backend.order.count((n, p)) for n in (1, 2) for p in (256, 1024)) >= 9
    assert backend.now > before


def test_sizes_that_no_acceptance_can_pay_for_are_left_out(backend):
    backend.per_row = 10.0  # with five heads a step may take six times as long
    found = measure_step_times(backend, (1, 2, 4, 6, 8, 16), TEXT, 0.0)
    assert sorted({one.nodes for one in found}) == [1, 2, 4, 6]
    assert (16, 64) not in backend.order


def test_a_stall_leaves_no_size_out(backend, monkeypatch):
    run, stalls = backend.run, [0.5, 0.5]

    def stalled(step):
        run(step)
        if step.input_ids.shape[1] == 4 and stalls:
            backend.now += stalls.pop()

    monkeypatch.setattr(backend, "run", stalled)
    found = measure_step_times(backend, (1, 2, 4, 8), TEXT, 0.0)
    assert sorted({one.nodes for one in found}) == [1, 2, 4, 8]
    assert [one.ms for one in found if one.nodes == 4 and one.past == 64] == [pytest.approx(13)]


def test_sizes_that_no_engine_fits_are_left_out(backend):
    backend.most = 4
    assert sorted({one.nodes for one in measure_step_times(backend, (1, 2, 4, 8), TEXT, 0.0)}) == [1, 2, 4]
    backend.most = 0
    with pytest.raises(CapacityError):
        measure_step_times(backend, (1, 2), TEXT, 0.0)


def test_a_short_context_bounds_both(monkeypatch):
    backend = Clocked(monkeypatch, context=100)
    backend.per_row = 0.1
    found = measure_step_times(backend, (1, 32, 64), TEXT, 0.0)
    assert {(one.nodes, one.past) for one in found} == {(1, 25), (32, 25), (64, 25)}
    assert [choose_pasts(context) for context in (8192, 512, 128, 100)] == [[64, 256, 1024], [64, 256], [64], [25]]


def test_logits_that_are_not_finite_end_it(backend):
    backend.broken = True
    with pytest.raises(InvalidLogitsError):
        measure_step_times(backend, (1, 2), TEXT, 0.0)


def test_a_backend_that_decodes_is_left_alone(backend):
    cache = KvCache(backend)
    with pytest.raises((MedusaError, BusyError), match="in use by another decoder"):
        measure_step_times(backend, (1, 2), TEXT, 0.0)
    del cache


def test_usual_trees_prefer_likely_candidates():
    heads = HeadFacts(3, 1, "none", 10)
    assert usual_tree(4, heads).paths == ((0,), (0, 0), (1,))
    for nodes in range(1, 200):
        assert usual_tree(nodes, heads).size == nodes
    assert usual_tree(1, heads).paths == TreeProfile.plain().paths
    few = HeadFacts(2, 1, "none", 2)  # [0], [1] and two behind each
    assert usual_tree(7, few).size == 7
    assert usual_tree(8, few) is None
