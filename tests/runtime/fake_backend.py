"""A backend without weights: a toy language model whose every answer depends on every row that it is shown.

It has two layers. A node's context is the sum of the hashes of all (token, position) that the node may see, as
attention sums over rows; its state is the sum of the hashes of the contexts of the same nodes; the logits are a hash
of the state. A row of the past is (token, position, context). So a row too many or too few, at a wrong position, from
a wrong node or made under a wrong mask gives other tokens from there on. Heads are scripted: what they propose follows
from the kept hidden state alone.
"""

import numpy as np
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends.base import PREFILL_CHUNK, BackendFacts, RowSummary
from medusa_runtime.backends.saved_past import SavedPast, check_length
from medusa_runtime.contract import summary_tokens
from medusa_runtime.errors import CapacityError
from medusa_runtime.exclusive import ExclusiveUse
from medusa_runtime.facts import HeadFacts, ModelFacts

VOCAB = 32
EOS = 31
POISON = 999  # no token; what nobody may read
UNIT = float(2**64)


def scramble(*numbers):
    """A hash of whole numbers or arrays of them, as uint64 (splitmix64)."""
    with np.errstate(over="ignore"):
        mixed = np.uint64(0)
        for number in numbers:
            mixed = (mixed ^ np.asarray(number).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def contexts_of(tokens):
    """The context at each of these tokens, as the first layer makes it from them and those before."""
    return np.cumsum(scramble(tokens, np.arange(len(tokens))), dtype=np.uint64)


def state_of(tokens):
    """The state after these tokens: what a correct past and a correct mask add up to."""
    return np.sum(scramble(contexts_of(tokens)), dtype=np.uint64)


def logits_of(states, vocab=VOCAB):
    """(...,) states -> (..., V) float32 logits between 0 and 8."""
    return (scramble(np.asarray(states)[..., None], np.arange(vocab)) / UNIT * 8).astype(np.float32)


def summary_of(logits):
    """A summary of a row (V,) with the most inconvenient ties: of equal logits those of higher ids first."""
    wide, count = logits.astype(np.float64), summary_tokens(len(logits))
    ids = np.lexsort((-np.arange(len(logits)), -wide))[:count].astype(np.int32)
    finite = bool(np.isfinite(logits).all())
    logsumexp = wide.max() + np.log(np.exp(wide - wide.max()).sum()) if finite else np.nan
    return RowSummary(ids, logits[ids], float(logsumexp), finite)


def plain_answer(prompt, max_new_tokens, stop_ids, context):
    """Greedy decoding spelt out, one token at a time: (answer, why it ended)."""
    tokens = list(prompt)
    while True:
        tokens.append(int(logits_of(state_of(tokens)).argmax()))
        answer = tokens[len(prompt) :]
        if tokens[-1] in stop_ids:
            return answer, "stop"
        if len(answer) == max_new_tokens:
            return answer, "length"
        if len(tokens) == context:
            return answer, "length"


def random_tree(rng, candidates, heads=5, ranks=6):
    """A tree grown by hanging each new candidate under a random node."""
    paths = [()]
    while len(paths) <= candidates:
        path = (*paths[rng.integers(len(paths))], int(rng.integers(ranks)))
        if path not in paths and len(path) <= heads:
            paths.append(path)
    return TreeProfile("random", tuple(paths[1:]))


def attend(past, new, mask):
    """The sum of what each node sees: (P,) past rows, (T,) new rows, (T, T) mask -> (T,)."""
    seen = np.where(mask, new, np.uint64(0))
    return np.sum(past, dtype=np.uint64) + np.sum(seen, axis=1, dtype=np.uint64)


class FakeBackend:
    """The toy model behind the Backend protocol; it refuses steps that break the graph contract.

    `hit_rate`: how often a head has the right token among its candidates; its rank is then below `spread`.
    `summaries`: whether it summarises rows, as a GPU backend does, or has none, as a CPU backend.
    `steps` lists the steps run, `read_rows` the rows whose logits were read, `read_summaries` those whose summaries
    were, `committed` the paths kept, `saved` and `restored` the numbers of rows copied.
    """

    name, precision, run_seconds = "fake", "exact", 0.0
    past_row_bytes = 24  # of tokens, positions and contexts

    def __init__(self, context=4096, heads=5, top_k=6, hit_rate=1.0, spread=1, summaries=False, vocab=VOCAB):
        self.model = ModelFacts("toy", "toy", 1, 8, 1, 1, 8, vocab, context, (vocab - 1,))
        self.heads = HeadFacts(heads, 1, "none", top_k)
        self.hit_rate, self.spread, self.summaries = hit_rate, spread, summaries
        self.prefill_chunk, self.padded_past_lengths = PREFILL_CHUNK, ()
        self.literal_counts, self.mixes_drafts = (1, 2, 3, 5), False
        self.exclusive_use, self.logits_on_host = ExclusiveUse("the toy"), not summaries
        self.tokens = self.positions = np.zeros((0, 0), dtype=np.int64)  # (B, capacity): the arena …
        self.contexts = np.zeros((0, 0), dtype=np.uint64)  # … of two layers
        self.hidden = []  # of each sequence the (state, context, position) of its last committed row
        self.memory = None  # most rows that `allocate` can give; None: any number
        self.steps, self.read_rows, self.read_summaries, self.committed = [], [], [], []
        self.saved, self.restored = [], []
        self._ran, self._read = None, []

    def facts(self):
        return BackendFacts("paper", "", "", "fake", "1.0", weight_bytes=1000, kv_bytes_per_token=8, bandwidth=None)

    def allocate(self, batch, capacity):
        if self.memory is not None and capacity > self.memory:
            raise CapacityError(f"no memory for {capacity} rows")
        for name in ("tokens", "positions", "contexts"):
            before = getattr(self, name)
            arena = np.full((batch, capacity), POISON, dtype=before.dtype)
            kept, rows = min(batch, before.shape[0]), min(capacity, before.shape[1])
            arena[:kept, :rows] = before[:kept, :rows]
            setattr(self, name, arena)
        if len(self.hidden) != batch:
            self.hidden = [None] * batch

    def run(self, step):
        if self._ran is not None:
            for array in (*self._ran, *self._read):  # what a run gave is valid until the next one
                array.fill(POISON)
        self._read = []  # arrays of summaries that were read
        self._check(step)
        B, T = step.input_ids.shape
        tokens = step.input_ids.copy()
        if step.draft:
            for b in range(B):
                candidates = self.propose(*self.hidden[b])  # (heads, top_k)
                open_nodes = tokens[b] < 0
                tokens[b, open_nodes] = candidates.ravel()[-1 - tokens[b, open_nodes]]
        contexts, states = np.zeros((2, B, T), dtype=np.uint64)
        for b in range(B):
            past, mask = slice(0, step.past_length[b]), step.tree_mask[b]
            first = scramble(self.tokens[b, past], self.positions[b, past])
            contexts[b] = attend(first, scramble(tokens[b], step.position_ids[b]), mask)
            states[b] = attend(scramble(self.contexts[b, past]), scramble(contexts[b]), mask)
        logits = logits_of(np.take_along_axis(states, step.logit_rows, axis=1), self.model.vocab_size)  # (B, R, V)
        self._ran = tokens, logits.argmax(-1).astype(np.int32), logits, states, contexts, step.position_ids.copy()
        self.steps.append(step)

    def _check(self, step):
        B, T = step.input_ids.shape
        R = step.logit_rows.shape[1]
        for array, shape, kind in (
            (step.input_ids, (B, T), np.int32),
            (step.position_ids, (B, T), np.int32),
            (step.tree_mask, (B, T, T), np.bool_),
            (step.past_length, (B,), np.int32),
            (step.logit_rows, (B, R), np.int32),
        ):
            assert array.shape == shape and array.dtype == kind
        assert len(self.tokens) == B and isinstance(step.summaries, bool)
        assert step.position_ids.min() >= 0 and step.position_ids.max() < self.model.context
        assert step.logit_rows.min() >= 0 and step.logit_rows.max() < T
        assert step.past_length.min() >= 0 and step.past_length.max() <= self.tokens.shape[1]
        assert step.input_ids.max() < self.model.vocab_size and step.input_ids[:, 0].min() >= 0
        assert step.tree_mask.diagonal(axis1=1, axis2=2).all()
        assert step.input_ids.min() >= (-self.heads.count * self.heads.top_k if step.draft else 0)
        for b in range(B):
            past = slice(0, step.past_length[b])
            assert POISON not in self.tokens[b, past]
            if step.draft:  # the hidden state must be that of the row before the root
                state = np.sum(scramble(self.contexts[b, past]), dtype=np.uint64)
                last = step.past_length[b] - 1
                assert self.hidden[b] == (state, self.contexts[b, last], last), "a draft from a stale hidden state"

    @np.errstate(over="ignore")
    def propose(self, state, context, position):
        """(heads, top_k) int32 candidates, by letting the toy model run on from a hidden state."""
        heads, top_k = self.heads.count, self.heads.top_k
        candidates = np.zeros((heads, top_k), dtype=np.int32)
        vocab = self.model.vocab_size
        token = logits_of(state, vocab).argmax()
        for head in range(heads):
            position += 1
            context = context + scramble(token, position)
            state = state + scramble(context)
            token = logits_of(state, vocab).argmax()  # the token head + 2 places after the hidden state's row
            candidates[head] = (token + 1 + np.arange(top_k)) % vocab  # wrong ones, all different
            if scramble(state, 1) / UNIT < self.hit_rate:
                candidates[head, int(scramble(state, 2) % np.uint64(self.spread))] = token
        return candidates

    def read_tokens(self, sequence=0):
        return self._ran[0][sequence].tolist()

    def read_argmax(self, sequence=0):
        return self._ran[1][sequence].tolist()

    def read_logits(self, row, sequence=0):
        self.read_rows.append(row)
        return self._ran[2][sequence, row]

    def read_finite(self, row, sequence=0):
        logits = self._ran[2][sequence, row]
        return bool(np.isfinite(logits).all()) if self.summaries else None

    def read_summary(self, row, sequence=0):
        logits = self._ran[2][sequence, row]
        if not (self.summaries and self.steps[-1].summaries):
            return None
        self.read_summaries.append(row)
        summary = summary_of(logits)
        self._read += [summary.ids, summary.logits]
        return summary

    def read_outputs(self):
        """Floats are cut to 16 bits of each hash, so that float32 holds them; keys tell the token, values the rest."""
        tokens, argmax, logits, states, contexts, positions = self._ran
        wide = np.ones(self.model.kv_row, dtype=np.float32)  # hidden_size too
        return {
            "tokens": tokens.copy(),
            "argmax": argmax.copy(),
            "logits": logits.copy(),
            "hidden": (states >> np.uint64(48))[..., None] * wide,
            "new_key_0": tokens[..., None] * wide,
            "new_value_0": ((contexts >> np.uint64(48)) + positions.astype(np.uint64))[..., None] * wide,
        }

    def commit(self, sequence, path, length):
        tokens, _, _, states, contexts, positions = self._ran
        path = list(path)
        assert path and length + len(path) <= self.tokens.shape[1]
        assert path == sorted(set(path)) and path[-1] < tokens.shape[1]
        rows, last = slice(length, length + len(path)), path[-1]
        self.tokens[sequence, rows] = tokens[sequence, path]
        self.positions[sequence, rows] = positions[sequence, path]
        self.contexts[sequence, rows] = contexts[sequence, path]
        self.hidden[sequence] = states[sequence, last], contexts[sequence, last], positions[sequence, last]
        self.committed.append(path)

    def default_prefix_bytes(self):
        return 1 << 20

    def save_past(self, length, sequence=0):
        check_length(length, self.tokens.shape[1])
        rows = [arena[sequence, :length].copy() for arena in (self.tokens, self.positions, self.contexts)]
        assert POISON not in rows[0]
        self.saved.append(length)
        return SavedPast(length, rows)

    def restore_past(self, saved, length, sequence=0):
        check_length(length, self.tokens.shape[1], saved)
        for arena, rows in zip((self.tokens, self.positions, self.contexts), saved.data, strict=True):
            arena[sequence, :length] = rows[:length]
        self.restored.append(length)
