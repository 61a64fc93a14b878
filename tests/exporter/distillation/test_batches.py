import numpy as np
import pytest
import torch
from medusa_exporter.distillation import batches, checkpoint
from medusa_exporter.distillation.dataset import DataError, DataFacts
from medusa_exporter.distillation.scripts import ANSWER, GeneratedRow, Request
from medusa_runtime.errors import CapacityError

FACTS = DataFacts("m", "d", 256, (1,), 0, {"context": 10})
REQUESTS = [Request((str(number),), 0.0) for number in range(7)]


class Drawing:
    """Writes one drawn answer token a line, and takes `seconds` for a batch by the clock it is given."""

    def __init__(self, clock, seconds=()):
        self.clock, self.seconds, self.written = clock, list(seconds), []

    def generate(self, scripts, tick):
        self.clock.now += self.seconds.pop(0) if self.seconds else 0
        tick(len(scripts))
        self.written.append(len(scripts))
        return [GeneratedRow(torch.randint(0, 200, (1,)).numpy(), np.array([ANSWER], np.uint8)) for _ in scripts]


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(batches.time, "monotonic", clock.monotonic)
    return clock


def write(writer, folder, until=float("inf"), seed=0):
    return batches.generate_batches(
        batches.split_batches(REQUESTS, 3),
        writer,
        lambda batch: [()] * len(batch),
        folder,
        context=10,
        seed=seed,
        until=until,
    )


def drawn(folder, count=3):
    return [[line.tokens.tolist() for line in checkpoint.load_batch(folder, number)] for number in range(count)]


def test_batches_are_generated_and_saved(tmp_path, clock):
    writer = Drawing(clock, [2, 3, 1])
    assert write(writer, tmp_path) == batches.Throughput(answer_tokens=7, seconds=6)
    assert writer.written == [3, 3, 1]
    assert [len(batch) for batch in drawn(tmp_path)] == [3, 3, 1]
    assert not checkpoint.is_saved(tmp_path, 3)


def test_samples_of_a_batch_follow_from_the_seed_and_its_number_alone(tmp_path, clock):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    write(Drawing(clock), folders[0])
    torch.rand(5)
    checkpoint.save_batch(folders[1], 1, checkpoint.load_batch(folders[0], 1))
    writer = Drawing(clock)
    assert write(writer, folders[1]).answer_tokens == 4
    assert writer.written == [3, 1]
    assert drawn(folders[0]) == drawn(folders[1])
    write(Drawing(clock), folders[2], seed=1)
    assert drawn(folders[0]) != drawn(folders[2])
    assert len({batches.batch_seed(seed, batch) for seed in range(9) for batch in range(9)}) == 81


@pytest.mark.parametrize(("until", "written"), [(99, 0), (100, 1), (107, 1), (108, 2), (113, 2), (114, 3)])
def test_no_batch_is_started_that_would_end_too_late(tmp_path, clock, until, written):
    writer = Drawing(clock, [4, 5, 5])  # the second is judged by the first: 104 + 4; the third: 109 + 5
    write(writer, tmp_path, until)
    assert len(writer.written) == written


def test_too_little_memory_is_reported(tmp_path, clock):
    class Greedy:
        def generate(self, scripts, tick):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(CapacityError, match=r"3 rows of 10 tokens .* lower --batch"):
        write(Greedy(), tmp_path)


def test_damaged_work_is_refused(tmp_path, clock):
    write(Drawing(clock), tmp_path)
    path = tmp_path / "batch-00001.npz"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"batch-00001\.npz: damaged"):
        checkpoint.load_batch(tmp_path, 1)


def test_unfinished_work_belongs_to_its_plan(tmp_path):
    opened = checkpoint.open_checkpoint(tmp_path, FACTS)
    assert checkpoint.open_checkpoint(tmp_path, FACTS) == opened
    with pytest.raises(DataError, match="other arguments"):
        checkpoint.open_checkpoint(tmp_path, DataFacts("m", "d", 256, (1,), 1, {}))


def test_waves_of_empty_lines_can_be_put_away(tmp_path):
    empty = GeneratedRow(np.zeros(0, np.int64), np.zeros(0, np.uint8))
    checkpoint.save_batch(tmp_path, 0, [empty, empty])
    assert drawn(tmp_path, 1) == [[[], []]]
