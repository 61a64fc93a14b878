"""A mailbox carries chunks in order to any reader, then one result or one error."""

import threading

import pytest
from medusa_runtime.errors import MedusaError
from medusa_runtime.mailbox import Mailbox
from medusa_runtime.results import Chunk

SECONDS = 20
CHUNKS = [Chunk(0, text, (number,)) for number, text in enumerate("abc")]
RESULT = object()


def test_chunks_come_in_order_then_the_result():
    box = Mailbox()
    for chunk in CHUNKS:
        box.put(chunk)
    assert not box.is_done
    box.finish(RESULT)
    assert box.is_done and box.result() is RESULT is box.result(0)
    assert [box.take() for _ in range(4)] == [*CHUNKS, None]


def test_an_error_comes_behind_the_chunks_and_again_each_time():
    box = Mailbox()
    box.put(CHUNKS[0])
    box.fail(MedusaError("first"))
    box.fail(MedusaError("second"))
    assert box.take() == CHUNKS[0]
    for _ in range(2):
        with pytest.raises(MedusaError, match="first"):
            box.take()
        with pytest.raises(MedusaError, match="first"):
            box.result()


def test_a_result_is_not_replaced_by_an_error():
    box = Mailbox()
    box.finish(RESULT)
    box.fail(MedusaError("late"))
    assert box.result() is RESULT and box.take() is None


@pytest.mark.parametrize("end", ["chunk", "result", "error"])
def test_a_reader_waits_for_what_comes_next(end):
    box, woken = Mailbox(), threading.Event()
    thread = threading.Thread(target=lambda: (box.wait_for_chunk(), woken.set()))
    thread.start()
    assert not woken.wait(0.02)
    {"chunk": lambda: box.put(CHUNKS[0]), "result": lambda: box.finish(RESULT), "error": lambda: box.fail(OSError())}[
        end
    ]()
    assert woken.wait(SECONDS)
    thread.join()


def test_waiting_for_a_result_may_take_too_long():
    box = Mailbox()
    with pytest.raises(TimeoutError, match=r"within 0\.01 seconds; it goes on"):
        box.result(0.01)


def test_a_listener_is_called_at_once_and_after_every_change():
    box, calls = Mailbox(), []
    box.put(CHUNKS[0])
    box.listen(lambda: calls.append(box.is_done))
    box.put(CHUNKS[1])
    box.finish(RESULT)
    assert calls == [False, False, True]
