"""The options of sampling parameters, which a command gets as one `SamplingParams`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from medusa_runtime.accept import Typical
from medusa_runtime.errors import ArgumentError, MedusaError
from medusa_runtime.sampling_params import DRAFTS, LOSSLESS, TYPICAL, SamplingParams

from medusa_exporter.cli.advice import for_command_line
from medusa_exporter.cli.options import INPUT_FILE, list_option

Returned = TypeVar("Returned")
Decorated = TypeVar("Decorated", bound=Callable[..., object])

ESCAPES = {"\\n": "\n", "\\r": "\r", "\\t": "\t", "\\\\": "\\"}
_DEFAULTS = {one.name: one.default for one in dataclasses.fields(SamplingParams)}
_TYPICAL = {f"typical_{one.name}": one.default for one in dataclasses.fields(Typical)}


@contextlib.contextmanager
def wrong_arguments_are_usage() -> Iterator[None]:
    """Report an ArgumentError of the runtime as wrong usage of the command."""
    try:
        yield
    except ArgumentError as error:
        raise click.UsageError(for_command_line(str(error))) from None


class _BiasType(click.ParamType):  # type: ignore[type-arg]
    """A token id and the number that is added to its logit, such as 5=-100."""

    name = "ID=BIAS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"got {value!r:.80}, expected a token id and a number, such as 5=-100", param, ctx)


def read_escapes(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    r"""Replace the escapes \n, \r, \t and \\ in texts; refuse any other backslash."""

    def replace(found: re.Match[str]) -> str:
        if found[0] not in ESCAPES:
            raise click.BadParameter(
                f"got {found.string!r:.80} with {found[0]}, expected a backslash in \\n, \\r, \\t or \\\\ only; write "
                "\\\\ for a backslash"
            )
        return ESCAPES[found[0]]

    return tuple(re.sub(r"\\.?", replace, value, flags=re.DOTALL) for value in values)


def _option(name: str, kind: Any, metavar: str, help: str, *more: str) -> Callable[[Decorated], Decorated]:
    """Create the option of a field that is a number, with the field's default."""
    default = _DEFAULTS[name]
    return click.option(
        f"--{name.replace('_', '-')}",
        *more,
        name,
        type=kind,
        metavar=metavar,
        default=default,
        show_default=default is not None,
        help=help,
    )


def _flag(name: str, help: str) -> Callable[[Decorated], Decorated]:
    return click.option(f"--{name.replace('_', '-')}", name, is_flag=True, help=help)


def _texts(name: str, help: str) -> Callable[[Decorated], Decorated]:
    return click.option(
        f"--{name.replace('_', '-')}",
        name,
        multiple=True,
        callback=read_escapes,
        metavar="TEXT",
        help=help
        + " A backslash before n, r or t makes a line feed, carriage return or tab; two make a backslash. May be "
        "repeated.",
    )


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    _option("max_tokens", click.INT, "TOKENS", "Maximum number of tokens of an answer.", "--max-new-tokens"),
    _option("min_tokens", click.INT, "TOKENS", "Number of tokens before which an answer cannot end by itself."),
    _option("temperature", click.FLOAT, "T", "Temperature of sampling; 0 is greedy decoding."),
    _option("top_p", click.FLOAT, "P", "Sample from the most likely tokens whose probabilities add up to P."),
    _option("top_k", click.INT, "K", "Sample from the K most likely tokens; 0 samples from all."),
    _option(
        "min_p", click.FLOAT, "P", "Sample from tokens that are at least P times as likely as the most likely one."
    ),
    _option("seed", click.INT, "N", "Seed of sampling: the same one gives the same answer. Default: a random one."),
    _option("n", click.INT, "N", "Number of answers."),
    _texts("stop", "Text that ends an answer, and is left out of it."),
    list_option(
        "--stop-token-ids",
        "stop_token_ids",
        metavar="ID",
        kind=click.INT,
        help="Token ids that end an answer, in addition to the model's own.",
    ),
    _flag("include_stop_str_in_output", "Keep the text that ended an answer in it."),
    _flag("ignore_eos", "Do not end an answer at the model's own end tokens."),
    click.option(
        "--skip-special-tokens/--no-skip-special-tokens",
        "skip_special_tokens",
        default=True,
        show_default=True,
        help="Leave special tokens out of the text, or show them.",
    ),
    _option("logprobs", click.INT, "N", "Return log-probabilities, of the N most likely tokens at each position too."),
    _option("repetition_penalty", click.FLOAT, "X", "Above 1, makes tokens of prompt and answer less likely."),
    _option("presence_penalty", click.FLOAT, "X", "Subtract X from the logits of tokens that the answer has."),
    _option("frequency_penalty", click.FLOAT, "X", "Subtract X for each time that the answer has a token."),
    list_option(
        "--logit-bias",
        "logit_bias",
        metavar="ID=BIAS",
        kind=_BiasType(),
        help="Numbers to add to the logits of token ids, e.g. 5=-100.",
    ),
    list_option(
        "--allowed-token-ids",
        "allowed_token_ids",
        metavar="ID",
        kind=click.INT,
        help="The only token ids that an answer may have. Default: all.",
    ),
    _texts("bad_words", "Word that an answer must not contain."),
    _option(
        "truncate_prompt_tokens",
        click.INT,
        "TOKENS",
        "Keep only so many tokens from the end of the prompt; -1 cuts only a prompt that leaves no room for an answer.",
    ),
    click.option(
        "--json-schema",
        type=INPUT_FILE,
        metavar="FILE",
        help="File of a JSON schema that answers have to match. This and the next four need the extra structured.",
    ),
    click.option("--json-object", is_flag=True, help="Answers have to be JSON objects, of any content."),
    click.option("--regex", metavar="REGEX", help="Regular expression that answers have to match as a whole."),
    _texts("choice", "Text that an answer may be; it is one of those that are named."),
    click.option(
        "--grammar",
        type=INPUT_FILE,
        metavar="FILE",
        help="File of a grammar, in llguidance's variant of Lark's syntax, that answers have to match.",
    ),
    click.option(
        "--disable-any-whitespace",
        is_flag=True,
        help="Write the JSON of --json-schema or --json-object without white space between its parts: shorter, faster.",
    ),
    click.option(
        "--draft",
        type=click.Choice(DRAFTS),
        help="What steps verify: heads is the tree, ngram what followed the last tokens earlier in the text, auto "
        "whichever is expected to be the fastest. No token of an answer depends on it. Default: heads with --profile, "
        "otherwise auto.",
    ),
    click.option(
        "--acceptance",
        default=LOSSLESS,
        show_default=True,
        type=click.Choice([LOSSLESS, TYPICAL]),
        help="Rule that accepts candidates. lossless gives exactly the answers of plain decoding; typical, the rule of "
        "the Medusa paper, is lossy: it gives other answers.",
    ),
    *(
        click.option(
            f"--{name.replace('_', '-')}", name, type=click.FLOAT, metavar="X", help=f"{help} Default: {default:g}."
        )
        for (name, default), help in zip(
            _TYPICAL.items(),
            (
                "Highest threshold of --acceptance typical, a probability.",
                "Factor of the threshold of --acceptance typical, which falls as the entropy rises.",
                "Temperature of the probabilities that --acceptance typical compares with its threshold.",
            ),
            strict=True,
        )
    ),
)
_STRUCTURED = {
    "json_schema": "json",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
_WITHOUT_SPACE = "disable_any_whitespace"
_NAMES = (
    *(name for name in _DEFAULTS if name not in ("profile", "structured_outputs")),
    *_STRUCTURED,
    _WITHOUT_SPACE,
    *_TYPICAL,
)


def sampling_options(command: Callable[..., Returned]) -> Callable[..., Returned]:
    """Add the options of `SamplingParams` to a command, which gets them as the argument `params`.

    Ranges are those of `SamplingParams`; a value that it refuses is wrong usage. `profile` is not among the options,
    since commands choose the tree of the engine.
    """

    @functools.wraps(command)
    def with_params(*arguments: Any, **options: Any) -> Returned:
        params = _params({name: options.pop(name) for name in _NAMES})
        return command(*arguments, params=params, **options)

    decorated: Callable[..., Returned] = with_params
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def _params(values: dict[str, Any]) -> SamplingParams:
    typical = {name.removeprefix("typical_"): value for name in _TYPICAL if (value := values.pop(name)) is not None}
    if typical and values["acceptance"] != TYPICAL:
        raise click.UsageError(f"--typical-{next(iter(typical))} is an option of --acceptance typical; leave it out")
    bias = dict(values["logit_bias"])
    if len(bias) < len(values["logit_bias"]):
        raise click.UsageError("--logit-bias has two numbers for one token id, expected one")
    values["logit_bias"] = bias or None
    values["allowed_token_ids"] = values["allowed_token_ids"] or None
    tight = values.pop(_WITHOUT_SPACE)
    values["structured_outputs"] = _structured({name: values.pop(name) for name in _STRUCTURED}, tight)
    with wrong_arguments_are_usage():
        try:
            if typical:
                values["acceptance"] = Typical(**typical)
        except MedusaError as error:
            raise click.UsageError(f"--acceptance typical: {error}") from None
        return SamplingParams(**values)


def _structured(values: dict[str, Any], tight: bool) -> dict[str, Any] | None:
    """Return what answers have to match; texts of files are read."""
    used = {name: value for name, value in values.items() if value not in (None, (), False)}
    if len(used) > 1:
        first, second, *_ = (f"--{name.replace('_', '-')}" for name in used)
        raise click.UsageError(f"{first} does not go with {second}; leave out one of the two")
    if tight and not used.keys() & {"json_schema", "json_object"}:
        raise click.UsageError("--disable-any-whitespace needs --json-schema FILE or --json-object; leave it out")
    return {
        **{_STRUCTURED[name]: _read_file(name, one) if isinstance(one, Path) else one for name, one in used.items()},
        **({_WITHOUT_SPACE: True} if tight else {}),
    } or None


def _read_file(name: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except ValueError:
        raise click.UsageError(f"--{name.replace('_', '-')}: {file} is not UTF-8; expected a text file") from None
