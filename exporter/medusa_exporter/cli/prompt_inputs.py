"""Prompts and their options from the command line: texts, and files of JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from medusa_profiles.profile import shown
from medusa_runtime.errors import PromptError
from medusa_runtime.strict_json import describe_json_error

from medusa_exporter.cli.options import INPUT_FILE

Decorated = TypeVar("Decorated", bound=Callable[..., object])
STANDARD_INPUT = "-"


def _read_arguments(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for value in values:
        name, sign, text = value.partition("=")
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            parsed, sign = None, ""
        if not sign or not name:
            raise click.BadParameter(
                f"got {value!r:.80}, expected a name and a JSON value, such as enable_thinking=false; a text is in "
                "double quotes"
            )
        if name in found:
            raise click.BadParameter(f"got {name!r:.80} twice, expected each name once")
        found[name] = parsed
    return found


def prompt_options(command: Decorated) -> Decorated:
    """Add the options that decide how a prompt is encoded."""
    options = (
        click.option(
            "--messages",
            type=INPUT_FILE,
            metavar="FILE",
            help='JSON file with a list of messages to answer in place of PROMPT, each with "role" and "content".',
        ),
        click.option(
            "--tools",
            type=INPUT_FILE,
            metavar="FILE",
            help="JSON file with a list of tools that the model may call, in OpenAI's form.",
        ),
        click.option(
            "--chat-template-argument",
            "chat_template_arguments",
            multiple=True,
            callback=_read_arguments,
            metavar="NAME=JSON",
            help="Further name for the chat template and its value as JSON, e.g. enable_thinking=false. May be "
            "repeated.",
        ),
        click.option(
            "--continue-final-message",
            is_flag=True,
            help="Continue the last message, one of the assistant, in place of answering it.",
        ),
        click.option(
            "--sanitize",
            is_flag=True,
            help="Encode control tokens in the prompt, such as one that ends a message, as ordinary text.",
        ),
        click.option("--raw", is_flag=True, help="Use PROMPT as it is, without the chat template."),
        click.option(
            "--chat-template",
            metavar="NAME",
            help="Chat template to use, by its name in the bundle. Default: the one that the bundle was built with.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def read_text(prompt: str) -> str:
    """Return the text of PROMPT; - is standard input.

    UTF-8 that Python has kept as single bytes, because the locale of the terminal is another one, is decoded.
    """
    text = sys.stdin.read() if prompt == STANDARD_INPUT else prompt
    try:
        return os.fsencode(text).decode() if any("\udc80" <= character <= "\udcff" for character in text) else text
    except UnicodeError:
        return text  # not UTF-8: the engine refuses it


def read_list(file: Path, what: str) -> list[Any]:
    """Return the list in a JSON file.

    Args:
        file: The file.
        what: What the list holds, for error messages.

    Raises:
        PromptError: The file is not JSON, or no list.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise PromptError(f"{file} holds {shown(found)}; expected a list of {what}, which are JSON objects")
    except (ValueError, RecursionError) as error:
        fault = describe_json_error(error)
        raise PromptError(f"{file} is not valid JSON: {fault}; expected a list of {what}") from None
    return found
