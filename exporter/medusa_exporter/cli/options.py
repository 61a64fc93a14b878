"""Options that several commands share, so that they have one name, one help text and one behaviour."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click
from medusa_profiles.catalogue import profile_from_file
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_runtime.backends import BACKENDS
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError
from medusa_runtime.facts import PLAIN

Decorated = TypeVar("Decorated", bound=Callable[..., object])

INPUT_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
BACKEND_NAMES = ("--backend", "--backends")  # both are accepted by every command


def _one_precision(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse a list, which `build` accepts and commands that run a graph do not."""
    if value and "," in value:
        raise click.BadParameter(f"got {value!r:.80}, expected one precision; run the command once for each")
    return value


precision_option = click.option(
    "--precision",
    metavar="NAME",
    callback=_one_precision,
    help="Precision of the graph to run, e.g. int8. Default: fp32, or the only precision in the bundle.",
)
gpu_option = click.option(
    "--gpu",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="Index of the GPU to use, as the CUDA driver counts them. CPU backends ignore it.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of CPU threads. Default: one for each physical core, or what the container's CPU quota allows.",
)
length_option = click.option(
    "--max-length",
    type=click.IntRange(min=16),
    metavar="TOKENS",
    help="Maximum number of tokens of a prompt and its answer together, which bounds the memory of the KV cache. "
    "Default: the context of the bundle.",
)
digest_option = click.option(
    "--expected-digest",
    metavar="SHA256",
    help="Refuse BUNDLE unless its manifest has this digest, which `medusa-export inspect` shows.",
)
calibration_option = click.option(
    "--calibration",
    type=INPUT_FILE,
    metavar="FILE",
    help="Calibration to use, which `medusa-export calibrate --json FILE` wrote, even on another machine. Default: "
    "the one of this machine in the user's cache.",
)
chat_template_option = click.option(
    "--chat-template",
    metavar="NAME|FILE",
    help="Chat template to use: the name of one that the model has, or a Jinja file. Default: the model's default "
    "template.",
)
turns_option = click.option(
    "--turns",
    default="all",
    show_default=True,
    type=click.Choice(["all", "first"]),
    help="Use all user messages of each prompt, one after the other, or the first message only.",
)
limit_option = click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Use at most the first N prompts. Default: all."
)
revision_option = click.option(
    "--revision",
    metavar="REVISION",
    help="Branch, tag or commit of the model on the Hugging Face hub. Default: its main branch.",
)
heads_revision_option = click.option(
    "--heads-revision",
    metavar="REVISION",
    help="Branch, tag or commit of the heads on the Hugging Face hub. Default: their main branch.",
)
data_option = click.option(
    "--data",
    "folders",
    multiple=True,
    required=True,
    type=click.Path(exists=True, file_okay=False),
    metavar="DATA",
    help="Folder of conversations that `medusa-export distill` wrote for MODEL. May be repeated.",
)
heads_output_option = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="HEADS",
    help="Folder to write the heads to.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Torch device to run the model on: auto, cpu, cuda, cuda:1 and so on. auto is the GPU if there is one.",
)
dtype_option = click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Data type of the model's weights. auto is bfloat16 on a GPU and float32 on a CPU.",
)
prompts_option = click.option(
    "--prompts",
    "file",
    type=INPUT_FILE,
    metavar="FILE",
    help='JSON Lines file of prompts: each line has "turns", a list of user messages. Default: six built-in prompts.',
)


def list_option(
    *names: str, metavar: str, help: str, kind: click.ParamType[Any] | None = None, unique: bool = True, **settings: Any
) -> Callable[[Decorated], Decorated]:
    """Create an option for several values, which may be repeated, separated by commas, or both.

    The command gets a tuple. Spaces around values and empty values are dropped, and so are duplicates; an option that
    has no value at all is refused, and so is a value that `kind` does not accept.

    Args:
        names: The spellings of the option and the name of the argument, as for `click.option`.
        metavar: What one value is called in the help.
        help: The help text.
        kind: The type of one value, for example `click.Choice`. Default: any text.
        unique: Whether a value that occurs twice counts once.
        settings: More settings of `click.option`; a default is a tuple of texts.
    """

    def split(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Any, ...]:
        parts = [part.strip() for value in values for part in value.split(",") if part.strip()]
        if values and not parts:
            raise click.BadParameter("got no value, expected at least one", context, parameter)
        found = [part if kind is None else kind.convert(part, parameter, context) for part in parts]
        return tuple(dict.fromkeys(found) if unique else found)

    return click.option(*names, multiple=True, callback=split, metavar=f"{metavar},...", help=help, **settings)


def backend_option(
    help: str = "Backend to run the graph with.",
    *,
    default: str | None = "ort-cpu",
    choices: Iterable[str] = tuple(BACKENDS),
) -> Callable[[Decorated], Decorated]:
    """Create the option of a command that runs one backend."""
    return click.option(
        *BACKEND_NAMES,
        "backend",
        default=default,
        show_default=default is not None,
        type=click.Choice(list(choices)),
        help=help,
    )


def backends_option(help: str) -> Callable[[Decorated], Decorated]:
    """Create the option of a command that runs several backends."""
    return list_option(
        *BACKEND_NAMES,
        "backends",
        metavar="NAME",
        kind=click.Choice(list(BACKENDS)),
        default=("ort-cpu",),
        show_default=True,
        help=help,
    )


def profiles_option(what: str) -> Callable[[Decorated], Decorated]:
    """Create the option that names trees of a bundle. what: what is done with them, a verb."""
    return list_option(
        "--profile",
        "profiles",
        metavar="NAME|FILE",
        help=f"Trees to {what}: names in the bundle, e.g. tree-4, or .toml files. Default: all trees of the bundle.",
    )


def capacity_options(command: Decorated) -> Decorated:
    """Add the options that say which lengths and GPUs TensorRT engines are built for."""
    options = (
        click.option(
            "--max-length",
            type=click.IntRange(min=16),
            metavar="TOKENS",
            help="Maximum number of tokens of a prompt and its answer together that TensorRT engines are built for; "
            "other backends do not need it. Default: the context of the bundle.",
        ),
        click.option(
            "--static-capacity",
            type=click.IntRange(min=1),
            metavar="TOKENS",
            help="Build TensorRT engines for this one number of past tokens, a multiple of 8, in place of a range of "
            "lengths.",
        ),
        list_option(
            "--target",
            "targets",
            metavar="SM",
            help="GPU architectures to build TensorRT engines for, e.g. sm86,sm89. Required by tensorrt-rtx, which "
            "builds ahead of time; tensorrt always builds for the GPU in this machine.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def choose_trees(bundle: Bundle, names: Iterable[str]) -> list[TreeProfile]:
    """Return the named trees, each once, or all that a bundle has; a name that ends in .toml is a file.

    A bundle without heads has none; there, "plain" may be named, which is no tree.

    Raises:
        BundleError: The bundle has no such tree.
        ProfileError: A file has no valid tree, one that the bundle's heads cannot fill, or the name of another tree.
    """
    wanted = list(dict.fromkeys(names)) or list(bundle.manifest.profiles)
    if not bundle.heads.count:
        return [find_tree(bundle, name) for name in wanted if name != PLAIN]
    if not wanted:
        raise BundleError(f"{bundle.root} has no profiles, so no tree can be run; build it again with some")
    trees = [find_tree(bundle, name) for name in wanted]
    if repeated := [
        tree.name for number, tree in enumerate(trees) if tree.name in {one.name for one in trees[:number]}
    ]:
        raise ProfileError(f"two trees are named {repeated[0]!r}; expected each name once: change the name in the file")
    return trees


def find_tree(bundle: Bundle, name: str) -> TreeProfile:
    """Return a tree of a bundle by name, or the one in a .toml file. Raises as `choose_trees` does."""
    tree = profile_from_file(name)
    if tree is None:
        return bundle.profile(name)
    tree.check_fits(bundle.heads.count, bundle.heads.top_k)
    return tree
