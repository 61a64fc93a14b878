"""Words agree with their numbers."""

from medusa_exporter.wording import counted


def test_one_is_singular() -> None:
    assert [counted(number, "token") for number in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
