"""A mailbox carries chunks in order to any reader, then one result or one error."""

import threading

import pytest
from medusa_runtime.errors import MedusaError
from medusa_runtime.mailbox import Mailbox
from medusa_runtime.results import Chunk

SECONDS = 20
CHUNKS = [Chunk(0, text, (number,)) for number, text in enumerate("abc")]
RESULT = object()


def nothing():
    """Counts no end."""


def test_chunks_come_in_order_then_the_result():
    box = Mailbox()
    for chunk in CHUNKS:
        box.put(chunk)
    assert not box.is_done
    box.finish(RESULT, nothing)
    assert box.is_done and box.result() is RESULT is box.result(0)
    assert [box.take() for _ in range(4)] == [*CHUNKS, None]


def test_an_error_comes_behind_the_chunks_and_again_each_time():
    box = Mailbox()
    box.put(CHUNKS[0])
    box.fail(MedusaError("first"), nothing)
    box.fail(MedusaError("second"), nothing)
    assert box.take() == CHUNKS[0]
    for _ in range(2):
        with pytest.raises(MedusaError, match="first"):
            box.take()
        with pytest.raises(MedusaError, match="first"):
            box.result()


def test_a_result_is_not_replaced_by_an_error():
    box = Mailbox()
    box.finish(RESULT, nothing)
    box.fail(MedusaError("late"), nothing)
    assert box.result() is RESULT and box.take() is None


@pytest.mark.parametrize("end", ["chunk", "result", "error"])
def test_a_reader_waits_for_what_comes_next(end):
    box, woken = Mailbox(), threading.Event()
    thread = threading.Thread(target=lambda: (box.wait_for_chunk(), woken.set()))
    thread.start()
    assert not woken.wait(0.02)
    {
        "chunk": lambda: box.put(CHUNKS[0]),
        "result": lambda: box.finish(RESULT, nothing),
        "error": lambda: box.fail(OSError(), nothing),
    }[end]()
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
    box.finish(RESULT, nothing)
    assert calls == [False, False, True]


def test_an_end_is_counted_once_and_before_a_reader_can_see_it():
    box, counted = Mailbox(), []
    box.listen(lambda: counted.append(f"listener, done: {box.is_done}"))
    box.finish(RESULT, lambda: counted.append(f"finish, done: {box.is_done}"))
    box.fail(MedusaError("late"), lambda: counted.append("fail"))
    assert counted == ["listener, done: False", "finish, done: False", "listener, done: True"]
    other = Mailbox()
    other.fail(MedusaError("first"), lambda: counted.append(f"fail, done: {other.is_done}"))
    assert counted[-1] == "fail, done: False" and other.is_done


def test_what_a_listener_raises_does_not_end_the_thread_that_calls_it(caplog):
    box, survived = Mailbox(), []

    def work():
        for error in (ValueError(), SystemExit(), KeyboardInterrupt()):
            box.listen(lambda error=error: (_ for _ in ()).throw(error))
        survived.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(SECONDS)
    assert survived and len(caplog.records) == 3
    with pytest.raises(KeyboardInterrupt):  # of the main thread, where a user presses Ctrl-C
        box.listen(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
