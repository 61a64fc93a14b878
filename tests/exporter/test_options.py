"""Options that commands share: the same names, the same list syntax and the same refusals everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from medusa_exporter.cli import COMMANDS, group
from medusa_exporter.cli.options import choose_trees, list_option
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in COMMANDS:
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from ((f"{name} {one}", other) for one, other in command.commands.items())
        elif command is not None:
            yield name, command


def options(command: click.Command) -> dict[str, click.Option]:
    found = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    return {name: option for option in found for name in option.opts}


ALL = dict(commands())
LISTS = {  # the options that take several values separated by commas
    ("bench", "--profile"), ("bench", "--backend"), ("bench", "--prompt-length"), ("bench", "--max-new-tokens"),
    ("build", "--backend"), ("build", "--precision"), ("build", "--profile"), ("build", "--target"),
    ("calibrate", "--backend"), ("calibrate", "--precision"), ("compare", "--backend"), ("distill", "--temperature"),
    ("engines", "--step"), ("engines", "--target"), ("generate", "--allowed-token-ids"), ("generate", "--logit-bias"),
    ("generate", "--stop-token-ids"), ("train", "--taps"), ("verify", "--profile"),
}  # fmt: skip
REPEATED = {  # the options whose values may contain commas
    ("generate", "--bad-words"), ("generate", "--chat-template-argument"), ("generate", "--choice"),
    ("generate", "--stop"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_the_common_options(name: str) -> None:
    found = options(ALL[name])
    assert {"--json", "--quiet", "-q", "--verbose", "-v", "--debug"} <= found.keys()
    assert not found["--json"].required
    assert ALL[name].epilog and f"medusa-export {name}" in ALL[name].epilog


@pytest.mark.parametrize("name", ALL)
def test_help_texts_are_sentences(name: str) -> None:
    for option in options(ALL[name]).values():
        text = option.help or ""
        assert text[:1].isupper() and text.endswith("."), (name, option.opts, text)
    assert (ALL[name].help or "").strip().endswith((".", ":"))


def test_an_option_of_one_value_is_not_repeated() -> None:
    for arguments in (
        ["generate", "bundle", "Hi", "--backend", "ort-cuda", "--backends", "ort-cpu"],
        ["bench", "bundle", "--precision", "fp32", "--precision=int8"],
        ["heads", "convert", "old", "-o", "one", "--output", "two"],
    ):
        result = CliRunner().invoke(group, arguments)
        assert result.exit_code == 2
        assert "is given 2 times, expected once" in result.output
    assert CliRunner().invoke(group, ["profiles", "-q", "-q", "--debug", "--debug"]).exit_code == 0


def test_the_backend_has_two_spellings_in_every_command() -> None:
    with_backend = {name for name, command in ALL.items() if "--backend" in options(command)}
    assert with_backend == {"bench", "build", "calibrate", "compare", "engines", "generate", "search-tree", "verify"}
    for name in with_backend:
        found = options(ALL[name])
        assert found["--backend"] is found["--backends"]
        for spelling in ("--backend", "--backends"):
            words = [*name.split(), "BUNDLE", spelling, "abacus"]
            refused = CliRunner().invoke(group, words)
            assert refused.exit_code == 2
            assert "'abacus' is not one of " in refused.output or "Missing" in refused.output


def test_list_options_are_known() -> None:
    found = {
        (name, option.opts[0])
        for name, command in ALL.items()
        for option in options(command).values()
        if option.multiple and not isinstance(option.type, click.Path)
    }
    assert found == LISTS | REPEATED
    for name, option in LISTS:
        assert str(options(ALL[name])[option].metavar).endswith(",...")
    for name, option in REPEATED:
        assert str(options(ALL[name])[option].help).endswith("May be repeated.")


def parsed(*words: str, **settings: object) -> list[object] | str:
    """What a command with a list option gets, or why it is refused."""
    kept: list[object] = []

    @click.command()
    @list_option("--number", "numbers", metavar="N", help="Numbers.", kind=click.IntRange(min=1), **settings)  # type: ignore[arg-type]
    def command(numbers: tuple[int, ...]) -> None:
        kept.extend(numbers)

    done = CliRunner().invoke(command, words)
    return kept if done.exit_code == 0 else done.output


def test_lists_are_repeated_or_comma_separated() -> None:
    for words in (["1,2"], ["1", "2"], [" 1 , 2 "], ["1,,2,"], ["1,2", "2,1"], ["", "1,2"]):
        assert parsed(*(part for word in words for part in ("--number", word))) == [1, 2], words
    assert parsed() == []
    assert parsed(default=("5",)) == [5]
    assert parsed("--number", "3", default=("5",)) == [3]
    assert parsed("--number", "2,1,2", unique=False) == [2, 1, 2]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "got no value, expected at least one"),
        (" , ", "got no value, expected at least one"),
        ("1,x", "'x' is not a valid integer range"),
        ("1,0", "0 is not in the range x>=1"),
    ],
)
def test_lists_refuse_what_is_no_value(value: str, reason: str) -> None:
    for settings in ({}, {"default": ("5",)}):
        assert reason in parsed("--number", value, **settings)


def test_trees_are_chosen_by_name_each_once(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert [tree.name for tree in choose_trees(bundle, ("tree-4", "chain-1", "tree-4"))] == ["tree-4", "chain-1"]
    assert len(choose_trees(bundle, ())) == len(bundle.manifest.profiles)
    with pytest.raises(BundleError, match="no profile 'oak'"):
        choose_trees(bundle, ("oak",))
