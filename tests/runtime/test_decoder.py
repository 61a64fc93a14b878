"""The loop over a toy model: whatever the tree, the answer is that of plain decoding, in fewer steps."""

import numpy as np
import pytest
from medusa_profiles import ProfileError, TreeProfile
from medusa_runtime import kv_cache
from medusa_runtime.accept import Typical, greedy
from medusa_runtime.backends.base import PREFILL_CHUNK
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import MedusaError

from .decoding import CHAIN, check_invariants, decode, finish, random_prompt
from .fake_backend import VOCAB, FakeBackend, logits_of, plain_answer, random_tree, state_of


@pytest.mark.parametrize("seed", range(100))
def test_every_tree_gives_the_answer_of_plain_decoding(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(kv_cache, "INITIAL_CAPACITY", int(rng.integers(1, 40)))
    prompt = random_prompt(rng, rng.integers(1, 40))
    context = len(prompt) + int(rng.integers(1, 80))
    backend = FakeBackend(context, hit_rate=rng.choice([0.0, 0.5, 0.9, 1.0]), spread=int(rng.integers(1, 4)))
    backend.prefill_chunk = int(rng.integers(1, 20))
    decoder = Decoder(backend, random_tree(rng, int(rng.integers(0, 25))))
    for _ in range(2):  # the second answer starts from what the first has left behind
        stop_ids = rng.integers(VOCAB, size=rng.integers(0, 3)).tolist()
        max_new_tokens = int(rng.choice([1, 2, 3, 20, 200]))
        expected = plain_answer(prompt, max_new_tokens, stop_ids, context)
        assert decode(decoder, prompt, max_new_tokens, stop_ids) == expected
        prompt = random_prompt(rng, rng.integers(1, context))


@pytest.mark.parametrize("length", [1, *(n * PREFILL_CHUNK + d for n in (1, 2) for d in (-1, 0, 1))])
def test_a_prompt_is_prefilled_in_chunks(length):
    prompt = random_prompt(np.random.default_rng(length), length)
    backend = FakeBackend()
    decoder = Decoder(backend, CHAIN)
    decoder.start(prompt, 2, ())
    whole, rest = divmod(length, PREFILL_CHUNK)
    assert [step.input_ids.shape[1] for step in backend.steps] == [PREFILL_CHUNK] * whole + [rest] * (rest > 0)
    assert all(not step.draft and step.logit_rows.shape == (1, 1) for step in backend.steps)
    check_invariants(decoder)
    assert decode(decoder, prompt, 30) == plain_answer(prompt, 30, (), 4096)


def test_warming_up_runs_every_shape_twice_and_forgets_what_was_decoded(monkeypatch):
    ran = []

    def note(step):  # the past has rows that nobody wrote, which the toy model would not bear
        ran.append((step.input_ids.shape[1], int(step.past_length[0]), step.draft))

    backend = FakeBackend(context=100)
    backend.padded_past_lengths, backend.prefill_chunk = (32, 64, 100), 8
    decoder = Decoder(backend, CHAIN)
    decoder.start([1, 2, 3], 20, ())
    decoder.step()
    with monkeypatch.context() as patched:
        patched.setattr(backend, "run", note)
        decoder.warm_up(lambda: ran.append("checkpoint"))
    assert ran[::2] == ["checkpoint"] * (len(ran) // 2)
    ran = ran[1::2]
    assert decoder.sequence is None and decoder.cache.length() == 0
    T = CHAIN.size
    trees = [(size, min(past, 100 - size), size == T) for past in (32, 64, 100) for size in (1, T)]
    prompts = [(size, min(past, 100 - size), False) for past in (32, 64, 100) for size in (1, 2, 4, 8)]
    assert ran == [shape for shape in trees + prompts for _ in range(2)]
    assert decode(decoder, [1, 2, 3], 30) == plain_answer([1, 2, 3], 30, (), 100)


def test_a_past_that_grows_again_and_again_is_kept():
    prompt = random_prompt(np.random.default_rng(5), 300)
    decoder = Decoder(FakeBackend(hit_rate=0.8), CHAIN)
    assert decode(decoder, prompt, 740) == plain_answer(prompt, 740, (), 4096)
    assert decoder.cache.capacity == 2048


def test_plain_decoding_takes_a_step_a_token_and_runs_no_heads():
    backend = FakeBackend()
    decoder = Decoder(backend)
    assert decode(decoder, [1, 2, 3], 10) == plain_answer([1, 2, 3], 10, (), 4096)
    assert decoder.steps == 9
    assert all(not step.draft and step.input_ids.shape == (1, 1) for step in backend.steps[1:])


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_perfect_heads_give_the_whole_depth_at_every_step(depth):
    """A draft from any hidden state but that of the last kept row would miss."""
    backend = FakeBackend()
    tree = TreeProfile("t", tuple((*[0] * d, r) for d in range(depth) for r in range(2)))
    decoder = Decoder(backend, tree)
    answer, _ = decode(decoder, [4, 5], 1 + 7 * (depth + 1))
    assert decoder.steps == 7
    assert (len(answer) - 1) / decoder.steps == depth + 1
    assert all(step.draft for step in backend.steps[1:])


def test_heads_that_always_miss_cost_nothing_but_time():
    decoder = Decoder(FakeBackend(hit_rate=0.0), CHAIN)
    assert decode(decoder, [4, 5], 20) == plain_answer([4, 5], 20, (), 4096)
    assert decoder.steps == 19


def test_the_better_the_heads_the_fewer_the_steps():
    steps = []
    for hit_rate in (0.0, 0.5, 0.9, 1.0):
        decoder = Decoder(FakeBackend(hit_rate=hit_rate), CHAIN)
        decode(decoder, [7], 200)
        steps.append(decoder.steps)
    assert steps == sorted(steps, reverse=True)
    assert 199 / steps[1] > 1.5
    assert 199 / steps[2] > 2.5


def test_a_wider_tree_finds_tokens_of_higher_rank():
    wide = TreeProfile("wide", tuple((*path, r) for path in ((), (0,), (1,), (2,)) for r in range(3)))
    steps = []
    for tree in (TreeProfile("thin", ((0,), (0, 0))), wide):
        decoder = Decoder(FakeBackend(spread=3), tree)
        assert decode(decoder, [7], 100) == plain_answer([7], 100, (), 4096)
        steps.append(decoder.steps)
    assert steps[1] == 33  # 3 tokens a step
    assert steps[0] > 50


def test_a_tree_beyond_the_heads_is_refused():
    with pytest.raises(ProfileError, match="has a path of depth 3"):
        Decoder(FakeBackend(heads=2), CHAIN)
    decoder = Decoder(FakeBackend(top_k=2), CHAIN)
    with pytest.raises(ProfileError, match="with rank 2"):
        decoder.set_profile(TreeProfile("wide", ((0,), (1,), (2,))))
    assert decoder.profile is CHAIN


def test_the_tree_may_change_in_the_middle_of_an_answer():
    rng = np.random.default_rng(3)
    decoder = Decoder(FakeBackend(hit_rate=0.7, spread=2))
    decoder.start([5, 6], 120, ())
    while decoder.sequence.finish_reason is None:
        decoder.set_profile(random_tree(rng, int(rng.integers(0, 12))))
        decoder.step()
        check_invariants(decoder)
    assert decoder.sequence.answer == plain_answer([5, 6], 120, (), 4096)[0]


def test_without_a_hidden_state_the_next_step_is_plain():
    backend = FakeBackend()
    decoder = Decoder(backend, CHAIN)
    decoder.start([5, 6], 40, ())
    decoder.step()
    decoder.cache.truncate(decoder.cache.length() - 2)
    del decoder.sequence.answer[-2:]
    assert len(decoder.step()) == 1
    assert (backend.steps[-1].draft, backend.steps[-1].input_ids.shape) == (False, (1, 1))
    finish(decoder)
    assert all(step.draft for step in backend.steps[-3:])
    assert decoder.sequence.answer == plain_answer([5, 6], 40, (), 4096)[0]


def test_greedy_reads_no_logits_from_a_device_and_on_the_host_those_that_decided():
    backend = FakeBackend(summaries=True)
    decode(Decoder(backend, CHAIN), [5, 6], 40)
    assert backend.read_rows == [0]  # of the prompt, to see that they are numbers
    backend = FakeBackend(hit_rate=0.5)
    decode(Decoder(backend, CHAIN), [5, 6], 40)
    _prefill, *steps = backend.committed
    assert backend.read_rows == [0, *(row for path in steps for row in path)]


@pytest.mark.parametrize("logits", [[np.nan], [0.0], [np.inf, 1.0], [np.nan, 1.0]], ids=str)
def test_logits_that_say_nothing_are_refused(logits, monkeypatch):
    """As a graph in 16 bits gives them when a norm's squares are too large: every token would be number 0."""
    backend = FakeBackend()
    wrong = np.resize(logits, VOCAB).astype(np.float32)
    monkeypatch.setattr(backend, "read_logits", lambda row: wrong)
    decoder = Decoder(backend, CHAIN)
    with pytest.raises(MedusaError, match=r"fake computed logits from .* in exact: expected finite"):
        decoder.start([5, 6])
    with pytest.raises(MedusaError, match="start a prompt first"):
        decoder.step()
    if logits == [0.0]:
        assert decoder.start([5, 5])  # a padding token alone may well give them


@pytest.mark.parametrize("seed", range(20))
def test_typical_acceptance_keeps_only_what_the_model_finds_likely(seed):
    """Lossy: the answer may differ from plain decoding, but each of its tokens passes the rule behind its prefix."""
    rng = np.random.default_rng(seed)
    backend = FakeBackend(hit_rate=0.6, spread=2)
    tree = random_tree(rng, 16)
    decoder = Decoder(backend, tree, Typical())
    prompt = random_prompt(rng, 5)
    decoder.start(prompt, 60, ())
    tokens = [*prompt, *decoder.sequence.answer]
    for given in finish(decoder):
        for place, token in enumerate(given):
            logits = logits_of(state_of(tokens)).astype(np.float64)
            p = np.exp(logits - np.logaddexp.reduce(logits))
            threshold = min(0.09, 0.3 * np.exp(np.sum(p * np.log(p))))
            last_of_a_whole_step = place == len(given) - 1 and decoder.sequence.length > len(tokens) + 1
            assert token == p.argmax() or (p[token] > threshold and not last_of_a_whole_step)
            tokens.append(token)
    assert set(backend.read_rows) <= set(range(tree.size))


def test_greedy_is_the_default_rule():
    assert Decoder(FakeBackend()).accept is greedy


class CommitsARejectedRow(FakeBackend):
    """Keeps a neighbour of the path's last row."""

    def commit(self, sequence, path, length):
        path = list(path)
        if len(path) < self._ran[0].shape[1]:
            path[-1] += 1
        super().commit(sequence, path, length)


class CommitsOneRowTooFew(FakeBackend):
    """Leaves the last row of a longer path out, its place in the arena as it was."""

    def commit(self, sequence, path, length):
        super().commit(sequence, path[:-1] if len(path) > 1 else path, length)


class KeepsAnotherHiddenState(FakeBackend):
    """The next draft starts from the root's row, not from that of the last node kept."""

    def commit(self, sequence, path, length):
        super().commit(sequence, path, length)
        self.hidden[sequence] = tuple(rows[sequence, 0] for rows in self._ran[3:])


class LosesRowsAsItGrows(FakeBackend):
    """Starts from an empty arena at every `allocate`."""

    def allocate(self, batch, capacity):
        self.tokens = self.positions = np.zeros((0, 0), dtype=np.int64)
        super().allocate(batch, capacity)


@pytest.mark.parametrize(
    "broken", [CommitsARejectedRow, CommitsOneRowTooFew, KeepsAnotherHiddenState, LosesRowsAsItGrows]
)
def test_the_checks_above_would_notice_a_broken_backend(broken, monkeypatch):
    monkeypatch.setattr(kv_cache, "INITIAL_CAPACITY", 8)
    expected = plain_answer([1, 2], 40, (), 4096)
    assert decode(Decoder(FakeBackend(), CHAIN), [1, 2], 40) == expected
    with pytest.raises(AssertionError):
        assert decode(Decoder(broken(), CHAIN), [1, 2], 40) == expected
