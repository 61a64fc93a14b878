from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from medusa_exporter.distillation import attention
from medusa_exporter.distillation.lockstep import WARM_UP_STEPS, LockstepGenerator, ScriptTables
from medusa_exporter.distillation.sampling import Sampling
from medusa_exporter.distillation.scripts import ANSWER, USER, Segment
from medusa_exporter.distillation.template_parts import EndTokens
from medusa_exporter.distillation.transformers_generate import TransformersGenerator
from medusa_runtime.errors import CapacityError

CONTEXT = 60
LENGTHS = (3, 9, 1, 17, 5, 2, 11)
ENDS = EndTokens((1, 7), user=8, answer=7)
MIN_P = Sampling()


def part(random, length, kind=ANSWER, temperature=0.0, limit=6):
    return Segment(random.integers(10, 256, size=length), kind, temperature, limit)


def scripts(parts=9):
    """Rows of different lengths: some fill the context, some end before."""
    random = np.random.default_rng(0)
    return [
        tuple(
            part(
                random, length if m == 0 else int(random.integers(0, 6)), (ANSWER, USER)[m % 2], 0.0, 3 + (row + m) % 7
            )
            for m in range(parts - row)
        )
        for row, length in enumerate(LENGTHS)
    ]


def reference(model, script, ends):
    """One row, part by part, by transformers' own greedy decoding: tokens and roles up to the last answer's end."""
    tokens, roles, pending = [], [], []
    for one in script:
        given = [*pending, *one.forced.tolist()]
        tokens, roles = tokens + given, roles + [0] * len(given)
        if len(tokens) >= CONTEXT:
            break
        own_end = ends.user if one.kind == USER else ends.answer
        ids = torch.tensor([tokens])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=min(one.limit, CONTEXT - len(tokens)),
            eos_token_id=sorted({*ends.eos, own_end} - {None}),
            pad_token_id=0,
        )[0, len(tokens) :].tolist()
        tokens, roles = tokens + out, roles + [one.kind] * len(out)
        pending = [] if own_end is None or out[-1] == own_end else [own_end]
    end = max((place + 1 for place, role in enumerate(roles[:CONTEXT]) if role == ANSWER), default=0)
    return tokens[:end], roles[:end]


def frequent_ends(model):
    """End tokens that the model does write: some it writes itself, and some have to be forced."""
    free = [reference(model, script, EndTokens(())) for script in scripts()]
    written = np.concatenate([[t for t, role in zip(*line, strict=True) if role] for line in free])
    common = [int(token) for token in np.argsort(-np.bincount(written, minlength=256), kind="stable")]
    return EndTokens((common[3], common[6]), user=common[4], answer=common[6])


def as_lists(lines):
    return [(line.tokens.tolist(), line.roles.tolist()) for line in lines]


def silent(_):
    return None


def lockstep(model, ends=ENDS, rows=8, sampling=MIN_P, bucket=16, context=CONTEXT):
    return LockstepGenerator(model, rows, context, ends, sampling, silent, bucket)


@pytest.fixture(scope="module")
def ends(model):
    return frequent_ends(model)


@pytest.fixture(scope="module")
def expected(model, ends):
    return [reference(model, script, ends) for script in scripts()]


def test_the_scripts_try_every_way_a_part_can_end(expected, ends):
    assert max(len(tokens) for tokens, _ in expected) == CONTEXT
    assert min(len(tokens) for tokens, _ in expected) < CONTEXT // 2
    pairs = [pair for tokens, roles in expected for pair in zip(tokens, roles, roles[1:], strict=False)]
    assert any(role == ANSWER and after == 0 and token == ends.answer for token, role, after in pairs)
    assert any(role == ANSWER and after == 0 and token == ends.eos[0] for token, role, after in pairs)
    assert any(role == ANSWER and after == 0 and token not in {*ends.eos} for token, role, after in pairs)
    assert any(role == USER and after != USER and token == ends.user for token, role, after in pairs)
    assert any(role == 0 and token == ends.answer for token, role, _ in pairs)
    assert any(role == 0 and token == ends.user for token, role, _ in pairs)


@pytest.mark.parametrize("bucket", [8, 128])
def test_greedy_lines_equal_generate_turn_by_turn(model, ends, expected, bucket):
    assert as_lists(lockstep(model, ends, bucket=bucket).generate(scripts(), silent)) == expected


def test_the_fallback_writes_the_same_lines(model, ends, expected):
    before = model.generation_config
    told = []
    assert (
        as_lists(TransformersGenerator(model, CONTEXT, ends, Sampling()).generate(scripts(), told.append)) == expected
    )
    assert model.generation_config is before
    assert sum(told) >= sum(len(tokens) for tokens, _ in expected)


def test_without_end_tokens_parts_run_to_their_limits(model):
    none = EndTokens(())
    expected = [reference(model, script, none) for script in scripts()]
    assert as_lists(lockstep(model, none).generate(scripts(), silent)) == expected
    assert as_lists(TransformersGenerator(model, CONTEXT, none, Sampling()).generate(scripts(), silent)) == expected


def test_only_the_needed_positions_are_attended_to(model, monkeypatch):
    seen = []
    real = attention.attend

    def spied(module, query, key, *rest, **named):
        seen.append(key.shape[2])
        return real(module, query, key, *rest, **named)

    monkeypatch.setattr(attention, "attend", spied)
    lockstep(model, bucket=16).generate(scripts(), silent)
    layers = model.config.num_hidden_layers
    assert seen == [16 * (position // 16 + 1) for position in range(CONTEXT - 1) for _ in range(layers)]


@pytest.mark.parametrize("make", [lockstep, lambda model: TransformersGenerator(model, CONTEXT, ENDS, Sampling())])
def test_draws_follow_the_seed_and_leave_greedy_rows_alone(model, make):
    random = np.random.default_rng(1)
    greedy, given = (part(random, 4, limit=20),), part(random, 4).forced
    batch = [
        (Segment(given, ANSWER, 1.5, 20),),
        greedy,
        (Segment(given, ANSWER, 1.5, 20),),
        (Segment(given, ANSWER, 0.5, 9),),
    ]

    def written(seed):
        torch.manual_seed(seed)
        return as_lists(make(model).generate(batch, silent))

    first = written(0)
    assert first == written(0)
    assert first != written(1)
    assert first[0] != first[2]
    assert first[1] == reference(model, greedy, ENDS)
    assert len(first[3][0]) <= 4 + 9


def test_the_limits_of_sampling_hold_within_the_lines(model):
    random = np.random.default_rng(1)
    warm = tuple(Segment(one.forced, one.kind, 5.0, one.limit) for one in (part(random, 4, limit=30),))
    cold = tuple(Segment(one.forced, one.kind, 0.0, one.limit) for one in warm)
    for make in (lockstep, lambda model, sampling: TransformersGenerator(model, CONTEXT, ENDS, sampling)):
        (found,) = as_lists(make(model, sampling=Sampling(top_k=1, min_p=0)).generate([warm], silent))
        assert found == reference(model, cold, ENDS)


def test_waves_follow_each_other_and_the_model_stays_as_it_was(model, ends, expected):
    before = model.config._attn_implementation
    made, told = lockstep(model, ends), []
    made.generate(scripts()[::-1], silent)
    assert as_lists(made.generate(scripts()[:3], told.append)) == expected[:3]
    assert sum(told) == 3 * (CONTEXT - 1)
    assert model.config._attn_implementation == before


def test_a_wave_ends_when_no_row_is_left(model):
    told = []
    (line,) = lockstep(model, context=200).generate([(part(np.random.default_rng(0), 3, limit=4),)], told.append)
    assert len(line.tokens) <= 7
    assert sum(told) == 32


def test_a_script_must_begin_with_a_given_token():
    for script in ((), (part(np.random.default_rng(0), 0),)):
        with pytest.raises(CapacityError, match="begin with forced tokens"):
            ScriptTables([script], 1, 20)


def test_a_given_part_longer_than_the_row_is_cut(model):
    random = np.random.default_rng(0)
    (line,) = lockstep(model).generate([(part(random, 3, limit=2), part(random, 100))], silent)
    assert len(line.tokens) <= 5
    assert (line.roles[3:] == ANSWER).all()


class FakeGraphs:
    """Stands in for CUDA's graphs: what is done while one is captured is undone, and done again when it is replayed."""

    def __init__(self, made, monkeypatch, refuses=False):
        self.made, self.refuses, self.replays, self.captured = made, refuses, 0, []
        made.capturing, made.pool, made.side = True, None, self
        for name in ("CUDAGraph", "graph", "synchronize", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def graph(self, graph, pool):
        return self.capture(graph)

    @contextmanager
    def capture(self, graph):
        if self.refuses:
            raise RuntimeError("operation not permitted\nwhen capturing")
        before = {name: tensor.clone() for name, tensor in vars(self.made).items() if isinstance(tensor, torch.Tensor)}
        real = self.made._step
        self.made._step = lambda *key: setattr(graph, "key", key)
        try:
            yield
        finally:
            self.made._step = real
        for name, tensor in before.items():
            assert torch.equal(getattr(self.made, name), tensor)
        self.captured.append(graph.key)

    def CUDAGraph(self):
        graph = SimpleNamespace()

        def replay():
            self.replays += 1
            self.made._step(*graph.key)

        graph.replay = replay
        return graph

    def synchronize(self):
        pass

    def current_stream(self):
        return self

    def wait_stream(self, other):
        pass

    @contextmanager
    def stream(self, side):
        yield


def test_each_bucket_is_captured_once_for_all_batches(model, ends, expected, monkeypatch):
    made = lockstep(model, ends)
    graphs = FakeGraphs(made, monkeypatch)
    assert as_lists(made.generate(scripts(), silent)) == expected
    assert graphs.captured == [(16, False), (32, False), (48, False), (64, False)]
    assert graphs.replays == CONTEXT - 1 - 4 * WARM_UP_STEPS
    addresses = {name: tensor.data_ptr() for name, tensor in vars(made).items() if isinstance(tensor, torch.Tensor)}
    assert as_lists(made.generate(scripts(), silent)) == expected
    assert graphs.replays == 2 * (CONTEXT - 1) - 4 * WARM_UP_STEPS
    made.generate([(part(np.random.default_rng(0), 3, temperature=1.0),)], silent)
    assert graphs.captured[4:] == [(16, True), (32, True)]  # what draws is another step
    assert {name: getattr(made, name).data_ptr() for name in addresses} == addresses


def test_without_a_graph_decoding_goes_on(model, ends, expected, monkeypatch):
    made, told = lockstep(model, ends), []
    made.report = told.append
    FakeGraphs(made, monkeypatch, refuses=True)
    assert as_lists(made.generate(scripts(), silent)) == expected
    assert told == ["no CUDA graph can be captured, so steps run eagerly (operation not permitted)"]
