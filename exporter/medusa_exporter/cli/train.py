"""`medusa-export train`: train Medusa heads on distilled conversations."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import (
    data_option,
    device_option,
    dtype_option,
    heads_output_option,
    list_option,
    revision_option,
)
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import note
from medusa_exporter.output_kinds import SUMMARIES, TRAINING
from medusa_exporter.overwrite_check import check_output_folder

if TYPE_CHECKING:
    from medusa_exporter.heads.modules import Conditioning


KIND = SUMMARIES["train"]


@click.command(
    name="train", cls=Command, example="medusa-export train HuggingFaceTB/SmolLM2-135M-Instruct --data data -o heads"
)
@click.argument("model")
@revision_option
@data_option
@heads_output_option
@click.option(
    "--heads",
    default=4,
    show_default=True,
    type=click.IntRange(1, 16),
    metavar="N",
    help="Number of heads: each predicts one more token ahead.",
)
@click.option(
    "--layers",
    default=3,
    show_default=True,
    type=click.IntRange(1, 16),
    metavar="N",
    help="Number of residual blocks in each head.",
)
@click.option(
    "--conditioning",
    default="root",
    show_default=True,
    type=click.Choice(["root", "none"]),
    help="What heads read in addition to the hidden state: root adds the embedding of the token that the model itself "
    "has just chosen; none is the form of the Medusa paper.",
)
@list_option(
    "--taps",
    metavar="LAYER",
    kind=click.IntRange(0),
    help="Decoder layers, counted from 0, whose input the heads read too. Default: none.",
)
@click.option(
    "--trunk",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    metavar="WIDTH",
    help="Width of the gated block that all heads share; 0 disables it.",
)
@click.option(
    "--draft-vocabulary",
    type=click.IntRange(1),
    metavar="N",
    help="Let heads choose among the N most frequent tokens of DATA only. Default: the whole vocabulary.",
)
@click.option(
    "--target",
    default="token",
    show_default=True,
    type=click.Choice(["token", "kl"]),
    help="What heads learn: token is the token that follows in DATA (cross-entropy), kl the distribution of the model "
    "there (KL divergence).",
)
@click.option(
    "--decay",
    default=0.8,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    metavar="FACTOR",
    help="Weight of each head's loss relative to that of the head before it.",
)
@click.option(
    "--weight-decay",
    default=0.3,
    show_default=True,
    type=click.FloatRange(0),
    metavar="FACTOR",
    help="Weight decay of AdamW, applied to weight matrices only.",
)
@click.option(
    "--dropout",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    metavar="SHARE",
    help="Dropout in the heads during training.",
)
@click.option(
    "--epochs",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    metavar="N",
    help="Number of passes over DATA.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    metavar="MINUTES",
    help="Train for about this long in place of --epochs; computing hidden states and evaluation are included.",
)
@click.option(
    "--batch",
    default=8192,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of token positions in one training step.",
)
@click.option(
    "--lr",
    default=1.5e-3,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    metavar="RATE",
    help="Highest learning rate of the schedule.",
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of the random numbers.")
@click.option(
    "--hold-out",
    default=0.02,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    metavar="SHARE",
    help="Share of the conversations that is kept for evaluation and not trained on.",
)
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=True,
    show_default=True,
    help="Try torch.compile for the loss and use it if it is faster; trying takes some seconds.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Start anew, whatever an earlier run left in HEADS. Finished heads stay until the new ones replace them.",
)
@click.option(
    "--disk",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Folder for a temporary file of hidden states, if they fit neither the device nor memory.",
)
@device_option
@dtype_option
@json_option("the record of the training")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    revision: str | None,
    folders: tuple[str, ...],
    output: Path,
    force: bool,
    results: Results,
    **options: Any,
) -> None:
    """Train Medusa heads for MODEL on DATA, and write them to HEADS. The model itself does not change.

    MODEL is a hub name, a folder or a GGUF file. The hidden states of all positions are computed once and stored: on
    the device, in memory, or in a file in --disk. A checkpoint is written into HEADS every minute.

    The same command resumes a run that was interrupted, and does nothing if HEADS is finished. If an argument or the
    data differs, it refuses to touch what is there; --force starts anew.

    To use several GPUs, start the command with `accelerate launch -m medusa_exporter`.
    """
    check_output_folder(output, TRAINING, inputs=map(Path, folders))
    results.check(KIND, outputs=[output / name for name in TRAINING])

    from medusa_exporter.distillation.dataset import concatenate, load_data
    from medusa_exporter.models import ModelSource, load_model
    from medusa_exporter.training.distributed import WorkerGroup
    from medusa_exporter.training.hidden_states import pick_device, pick_dtype
    from medusa_exporter.training.resume import TRAINING_NAME, describe_run, find_earlier_run
    from medusa_exporter.training.train import Settings, train

    settings = Settings(
        heads=options["heads"],
        layers=options["layers"],
        conditioning=cast("Conditioning", options["conditioning"]),
        taps=options["taps"],
        trunk=options["trunk"],
        draft_vocabulary=options["draft_vocabulary"],
        target=cast("Any", options["target"]),
        decay=options["decay"],
        weight_decay=options["weight_decay"],
        dropout=options["dropout"],
        epochs=options["epochs"],
        minutes=options["minutes"],
        batch=options["batch"],
        learning_rate=options["lr"],
        seed=options["seed"],
        hold_out=options["hold_out"],
        compiled=options["compiled"],
    )
    source = ModelSource.resolve(model, revision)
    data = concatenate([load_data(folder) for folder in folders])
    workers, device = WorkerGroup.join(pick_device(options["device"]))
    name, dtype = source.name, pick_dtype(options["dtype"], device)
    run = describe_run(settings, data, name=name, revision=revision, dtype=dtype, workers=workers.count)
    if not force and find_earlier_run(output, run) == "finished":  # before the model is loaded
        if workers.is_main:
            note(f"{output} is up to date; --force trains anew")
    else:
        train(
            load_model(source, dtype, device),
            data,
            settings,
            output,
            name=name,
            command=shlex.join(
                [*ctx.command_path.split(), name, *_as_typed(ctx.command, {"revision": revision, **options})]
            ),
            report=lambda text: note(text) if workers.is_main else None,
            revision=revision,
            force=force,
            disk=options["disk"],
            workers=workers,
        )
    if workers.is_main:
        results.write(KIND, {"output": str(output), **json.loads((output / TRAINING_NAME).read_bytes())})


def _as_typed(command: click.Command, options: dict[str, Any]) -> list[str]:
    """Return the options as they would be typed, in the order of --help, without those that choose where to run."""
    left_out = ("device", "dtype", "disk", "compiled")
    named = [p for p in command.params if p.name in options and p.name not in left_out and options[p.name] is not None]
    words: list[str] = []
    for parameter in named:
        value = options[parameter.name]
        for each in value if isinstance(value, tuple) else (value,):
            words += [parameter.opts[-1], str(each)]
    return words
