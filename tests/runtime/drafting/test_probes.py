"""What was not tried for long is tried again: rarely where it does not pay, and soon again where it does."""

from medusa_runtime.drafting.probes import EVERY, SOON, Probes


def steps_between(probes: Probes, intervals: dict[str, float], count: int, *, promising: bool = False) -> list[int]:
    """Run "used" until `count` probes were made; the steps before each."""
    found, waited = list[int](), 0
    while len(found) < count:
        due = probes.due(intervals)
        if due is None:
            probes.count("used")
            waited += 1
        else:
            probes.count(due, probed=True, promising=promising)
            found.append(waited)
            waited = 0
    return found


def test_nothing_is_tried_without_a_reason() -> None:
    probes = Probes()
    assert probes.due({}) is None and probes.due({"a": 1.0}) is None  # too soon
    for _ in range(EVERY):
        probes.count("used")
    assert probes.due({"used": 5.0}) is None  # the last step was one
    assert probes.due({"used": 5.0, "a": EVERY * 2}) is None
    assert probes.due({"used": 5.0, "a": EVERY / 2, "b": EVERY / 4}) == "b"


def test_what_does_not_pay_is_tried_more_and_more_rarely() -> None:
    waits = steps_between(Probes(), {"a": 64.0}, 8)
    assert waits[0] >= 63 and waits == sorted(waits) and 230 <= waits[-1] <= 260


def test_what_pays_is_tried_again_at_once() -> None:
    probes = Probes()
    assert steps_between(probes, {"a": 64.0}, 3)[-1] > 100
    assert steps_between(probes, {"a": 64.0}, 3, promising=True)[1:] == [SOON, SOON]
    assert steps_between(probes, {"a": 64.0}, 1)[0] == SOON  # the last one of them was promising, this one is not
    assert steps_between(probes, {"a": 64.0}, 1)[0] > 90


def test_probes_are_apart_however_many_candidates_there_are() -> None:
    waits = steps_between(Probes(), {str(number): 1.0 for number in range(20)}, 20)
    assert min(waits) >= EVERY - 1
