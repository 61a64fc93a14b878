"""Every command, option, link, path and dotted name in the documentation exists."""

import importlib
import re

import click
import pytest
from medusa_exporter.cli import group

from .pages import PAGES, ROOT, anchors, commands, links, name_of

EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=name_of)
DOTTED = re.compile(r"\bmedusa_(?:profiles|runtime|exporter)(?:\.[A-Za-z_]\w*)+")
PATH = re.compile(
    r"(?<![\w/.-])((?:runtime/medusa_runtime|exporter/medusa_exporter|profiles/medusa_profiles|benchmarks|tests|docs)"
    r"/[\w./*-]*\w)"
)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
OF_OTHERS = {"--index-url", "--strict", "--gpus"}  # options of other programs


def unusable(words):
    """Say what is wrong with a command line of medusa-export, "" if nothing is; files are not looked for."""
    command, context, words = group, click.Context(group), words[1:]
    while isinstance(command, click.Group):
        name = next((word for word in words if not word.startswith("-")), "")
        found = command.get_command(context, name)
        if found is None:
            return f"no command {name!r}"
        words.remove(name)
        command, context = found, click.Context(found, context)
    try:
        values, rest, _ = command.make_parser(context).parse_args(list(words))
    except click.UsageError as error:
        return error.format_message()
    if rest:
        return f"unexpected {rest}"
    lacking = [parameter.name for parameter in command.params if parameter.required and not values.get(parameter.name)]
    return f"lacks {lacking}" if lacking else ""


@EVERY_PAGE
def test_commands_have_only_options_that_exist(page):
    wrong = {" ".join(words): problem for words in commands(page) if (problem := unusable(words))}
    assert wrong == {}


def test_a_wrong_command_is_found():
    assert unusable(["medusa-export", "build", "MODEL", "--heads", "H", "-o", "B"]) == ""
    assert "no command" in unusable(["medusa-export", "bild"])
    assert "--hed" in unusable(["medusa-export", "build", "MODEL", "--hed", "H", "-o", "B"])
    assert "lacks" in unusable(["medusa-export", "build", "MODEL"])
    assert "unexpected" in unusable(["medusa-export", "inspect", "A", "B"])


def all_options(command):
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from all_options(command.get_command(context, name))
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)


@EVERY_PAGE
def test_options_exist(page):
    of_scripts = {
        option for script in (ROOT / "benchmarks").glob("*.*") for option in OPTION.findall(script.read_text("utf-8"))
    }
    known = {*all_options(group), *of_scripts, "--help", "--version", *OF_OTHERS}
    assert set(OPTION.findall(page.read_text(encoding="utf-8"))) - known == set()


@EVERY_PAGE
def test_links_lead_somewhere(page):
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


@EVERY_PAGE
def test_paths_exist(page):
    missing = {path for path in PATH.findall(page.read_text(encoding="utf-8")) if not any(ROOT.glob(path))}
    assert missing == set()


def resolves(name):
    """Whether a dotted name is a module, or leads through attributes from one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, part, None)
        return True
    return False


@EVERY_PAGE
def test_dotted_names_exist(page):
    assert [name for name in DOTTED.findall(page.read_text(encoding="utf-8")) if not resolves(name)] == []


def test_a_wrong_name_is_found():
    assert resolves("medusa_runtime.decoder.Decoder.step")
    assert not resolves("medusa_runtime.decoder.Decoder.stride")
    assert not resolves("medusa_runtime.decodr")
