import numpy as np
import pytest
from medusa_runtime.backends.base import Step
from medusa_runtime.errors import CapacityError, MedusaError
from medusa_runtime.kv_cache import INITIAL_CAPACITY, KvCache

from .fake_backend import VOCAB, FakeBackend


def run(cache, backend, rows):
    """Run one chunk of `rows` literal tokens for every sequence and return them, (B, rows)."""
    lengths = [cache.length(b) for b in range(cache.batch)]
    tokens = np.random.default_rng(sum(lengths)).integers(VOCAB, size=(cache.batch, rows), dtype=np.int32)
    backend.run(
        Step(
            input_ids=tokens,
            position_ids=np.stack([np.arange(n, n + rows, dtype=np.int32) for n in lengths]),
            tree_mask=np.stack([np.tri(rows, dtype=np.bool_)] * cache.batch),
            past_length=np.array(lengths, dtype=np.int32),
            logit_rows=np.full((cache.batch, 1), rows - 1, dtype=np.int32),
            draft=False,
        )
    )
    return tokens


def test_starts_empty_with_a_small_arena():
    backend = FakeBackend()
    cache = KvCache(backend)
    assert (cache.length(), cache.capacity, cache.can_draft()) == (0, INITIAL_CAPACITY, False)
    assert backend.tokens.shape == (1, INITIAL_CAPACITY)


def test_a_backend_has_one_cache_at_a_time():
    backend = FakeBackend()
    cache = KvCache(backend)
    tokens = run(cache, backend, 3)
    cache.commit(range(3))
    with pytest.raises(MedusaError, match=r"^the backend 'fake' is in use by another decoder or cache.*load a second"):
        KvCache(backend, batch=2)
    assert backend.tokens.shape == (1, INITIAL_CAPACITY)
    np.testing.assert_array_equal(backend.tokens[0, :3], tokens[0])
    KvCache(FakeBackend())  # another backend is free
    del cache
    assert KvCache(backend, batch=2).batch == 2  # and this one is again


def test_a_cache_that_finds_no_memory_leaves_the_backend_free():
    backend = FakeBackend()
    backend.memory = 10
    try:
        KvCache(backend)
    except CapacityError:
        backend.memory = None
        assert KvCache(backend).capacity == INITIAL_CAPACITY
    else:
        pytest.fail("there was memory")


def test_a_short_context_is_all_the_capacity_there_is():
    backend = FakeBackend(context=100)
    assert KvCache(backend).capacity == backend.tokens.shape[1] == 100


def test_growth_loses_no_row_and_ends_at_the_context():
    backend = FakeBackend(context=1500)
    cache, written, capacities = KvCache(backend), [], []
    while cache.length() < 1500:
        rows = min(97, 1500 - cache.length())
        written += run(cache, backend, rows)[0].tolist()
        cache.commit(range(rows))
        capacities.append(cache.capacity)
        assert cache.length() == len(written) <= cache.capacity == backend.tokens.shape[1]
        np.testing.assert_array_equal(backend.tokens[0, : cache.length()], written)
        np.testing.assert_array_equal(backend.positions[0, : cache.length()], np.arange(cache.length()))
    assert sorted(set(capacities)) == [256, 512, 1024, 1500]


def test_one_reservation_grows_as_far_as_needed():
    backend = FakeBackend()
    cache = KvCache(backend)
    run(cache, backend, 5)
    cache.commit(range(5))
    before = backend.tokens[0, :5].copy()
    cache.reserve(1025)
    assert cache.capacity == backend.tokens.shape[1] == 2048
    np.testing.assert_array_equal(backend.tokens[0, :5], before)
    cache.reserve(3)
    assert cache.capacity == 2048


def test_more_rows_than_the_context_are_refused():
    cache = KvCache(FakeBackend(context=300))
    with pytest.raises(CapacityError, match=r"^301 tokens do not fit: the model's context is 300; shorten"):
        cache.reserve(301)
    cache.reserve(300)
    assert cache.capacity == 300


def test_growth_that_fails_leaves_the_cache_as_it_was():
    backend = FakeBackend()
    cache = KvCache(backend)
    tokens = run(cache, backend, 200)
    cache.commit(range(200))
    run(cache, backend, 100)
    backend.memory = 256
    with pytest.raises(CapacityError, match="no memory"):
        cache.commit(range(100))
    assert (cache.length(), cache.capacity, backend.tokens.shape) == (200, 256, (1, 256))
    backend.memory = None
    cache.commit(range(100))
    assert (cache.length(), cache.capacity) == (300, 512)
    np.testing.assert_array_equal(backend.tokens[0, :200], tokens[0])


def test_commit_writes_the_path_in_order_behind_the_past():
    backend = FakeBackend()
    cache = KvCache(backend)
    first = run(cache, backend, 4)
    cache.commit([0, 1, 2])
    second = run(cache, backend, 6)
    cache.commit([0, 2, 5])
    assert cache.length() == 6
    np.testing.assert_array_equal(backend.tokens[0, :6], [*first[0, :3], *second[0, [0, 2, 5]]])


@pytest.mark.parametrize("nothing", [[], range(0), ()])
def test_committing_nothing_changes_nothing(nothing):
    backend = FakeBackend()
    cache = KvCache(backend)
    cache.commit(nothing)
    assert (cache.length(), cache.can_draft(), backend.committed) == (0, False, [])


def test_truncate_forgets_the_end_and_the_hidden_state():
    backend = FakeBackend()
    cache = KvCache(backend)
    kept = run(cache, backend, 10)
    cache.commit(range(10))
    cache.truncate(10)
    assert (cache.length(), cache.can_draft()) == (10, True)
    cache.truncate(7)
    assert (cache.length(), cache.can_draft()) == (7, False)
    new = run(cache, backend, 2)
    cache.commit(range(2))
    assert (cache.length(), cache.can_draft()) == (9, True)
    np.testing.assert_array_equal(backend.tokens[0, :9], [*kept[0, :7], *new[0]])
    cache.truncate(0)
    assert (cache.length(), cache.can_draft()) == (0, False)


@pytest.mark.parametrize("length", [-1, 11])
def test_truncate_refuses_what_is_not_there(length):
    backend = FakeBackend()
    cache = KvCache(backend)
    run(cache, backend, 10)
    cache.commit(range(10))
    with pytest.raises(ValueError, match=f"cannot truncate a past of 10 rows to {length}"):
        cache.truncate(length)
    assert (cache.length(), cache.can_draft()) == (10, True)


def test_sequences_of_a_batch_keep_to_themselves():
    backend = FakeBackend()
    cache = KvCache(backend, batch=3)
    first = run(cache, backend, 150)
    cache.commit(range(150), 0)
    cache.commit([0, 3], 2)
    second = run(cache, backend, 150)
    cache.commit(range(150), 0)  # grows the arenas of all three
    cache.commit([1], 2)
    assert [cache.length(b) for b in range(3)] == [300, 0, 3]
    assert [cache.can_draft(b) for b in range(3)] == [True, False, True]
    np.testing.assert_array_equal(backend.tokens[0, :300], [*first[0], *second[0]])
    np.testing.assert_array_equal(backend.tokens[2, :3], [*first[2, [0, 3]], second[2, 1]])
    cache.truncate(1, 0)
    assert [cache.length(b) for b in range(3)] == [1, 0, 3]
    assert [cache.can_draft(b) for b in range(3)] == [False, False, True]
