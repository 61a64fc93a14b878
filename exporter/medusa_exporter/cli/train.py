"""`medusa-export train`: train heads on distilled data, the decoder frozen."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from medusa_exporter.output_kinds import TRAINING
from medusa_exporter.overwrite_check import check_output_folder

if TYPE_CHECKING:
    from medusa_exporter.heads.modules import Conditioning


@click.command(name="train")
@click.argument("model")
@click.option(
    "--data", "folders", multiple=True, required=True, type=click.Path(exists=True, file_okay=False), metavar="DATA"
)
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="HEADS")
@click.option("--heads", default=4, show_default=True, type=click.IntRange(1, 16))
@click.option("--layers", default=3, show_default=True, type=click.IntRange(1, 16), help="ResBlocks per head.")
@click.option("--conditioning", default="root", show_default=True, type=click.Choice(["root", "none"]))
@click.option("--taps", multiple=True, type=click.IntRange(0), help="Decoder layers whose input heads see too.")
@click.option("--trunk", default=0, show_default=True, type=click.IntRange(0), help="Width of a gated block in front.")
@click.option("--draft-vocabulary", type=click.IntRange(1), metavar="N", help="Score the N most frequent tokens only.")
@click.option("--target", default="token", show_default=True, type=click.Choice(["token", "kl"]))
@click.option("--decay", default=0.8, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="λ.")
@click.option("--weight-decay", default=0.3, show_default=True, type=click.FloatRange(0), help="On matrices.")
@click.option("--dropout", default=0.1, show_default=True, type=click.FloatRange(0, 1, max_open=True))
@click.option("--epochs", default=2.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Take about so long instead of --epochs.")
@click.option("--batch", default=8192, show_default=True, type=click.IntRange(1), help="Positions a step.")
@click.option("--lr", default=1.5e-3, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--seed", default=0, show_default=True)
@click.option("--hold-out", default=0.02, show_default=True, type=click.FloatRange(0, 1, max_open=True))
@click.option("--compile/--no-compile", "compiled", default=True, help="Try if a compiled loss is faster.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in HEADS.")
@click.option("--disk", type=click.Path(file_okay=False, path_type=Path), help="For states that fit no memory.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 …")
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(["auto", "float32", "bfloat16"]))
@click.pass_context
def command(ctx: click.Context, /, model: str, folders: tuple[str, ...], output: Path, **options: Any) -> None:
    """Train heads for MODEL on DATA made by distill, and write them to HEADS.

    The decoder stays as it is. Hidden states of all positions are computed once and kept: on the device, in memory, or
    in a file under --disk. A checkpoint is put into HEADS every minute. For several GPUs, start the same command by
    `accelerate launch -m medusa_exporter`.
    """
    check_output_folder(output, TRAINING, inputs=map(Path, folders))

    from medusa_exporter.distillation.dataset import concatenate, load_data
    from medusa_exporter.models import ModelSource, load_model
    from medusa_exporter.training.distributed import WorkerGroup
    from medusa_exporter.training.hidden_states import pick_device, pick_dtype
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
    source = ModelSource.resolve(model)
    data = concatenate([load_data(folder) for folder in folders])
    workers, device = WorkerGroup.join(pick_device(options["device"]))
    loaded = load_model(source, pick_dtype(options["dtype"], device), device)
    name = source.name
    line = shlex.join([*ctx.command_path.split(), name, *_words(ctx.command, options)])
    train(
        loaded,
        data,
        settings,
        output,
        name=name,
        command=line,
        echo=lambda text: click.echo(text, err=True) if workers.first else None,
        resume=options["resume"],
        disk=options["disk"],
        workers=workers,
    )


def _words(command: click.Command, options: dict[str, Any]) -> list[str]:
    """The options as they would be typed, in the order of --help, without those that say where to run."""
    left_out = ("device", "dtype", "resume", "disk", "compiled")
    named = [p for p in command.params if p.name in options and p.name not in left_out and options[p.name] is not None]
    words: list[str] = []
    for parameter in named:
        value = options[parameter.name]
        for each in value if isinstance(value, tuple) else (value,):
            words += [parameter.opts[-1], str(each)]
    return words
