"""`modaltune train`: from a configuration and cases folders to a run folder."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from modaltune.cli_parts import (
    INTERRUPTED,
    JsonFlag,
    err_console,
    out_console,
    print_json,
    reports_errors,
)


@reports_errors
def train(
    config: Annotated[
        Path | None,
        typer.Argument(help="TOML file; or config.toml of a run folder, to go on.", metavar="TOML"),
    ] = None,
    preset: Annotated[
        Literal["prov-gigapath", "titan", "small", "genes"] | None,
        typer.Option(help="Published settings of a slide encoder, or a small one for a CPU."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one field, may be repeated.", metavar="KEY.SUB=VALUE"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder: output.folder.")] = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print every field with its meaning, and exit."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Tune a Modal Adapter on cases folders, towards the sentences of their labels.

    --set learner.kind=… trains a baseline on classes and survival instead: linear_probe, abmil,
    pathway_mlp, gene_mixer, mcat or late_fusion.

    Everything is fitted on the training split. Each epoch is judged on the validation split; the
    best is kept in the run folder (run.json, model.safetensors). Stopped or killed, the same
    command goes on where it was. On several GPUs: torchrun --nproc-per-node N -m modaltune train …
    """
    from modaltune.config_text import to_toml
    from modaltune.run_config import load_run_config

    changes = [*(sets or []), *([] if out is None else [f"output.folder={str(out)!r}"])]
    read = load_run_config(config, preset=preset, sets=changes)
    if print_config:
        sys.stdout.write(to_toml(read))
        return
    from modaltune.train_run import run_training
    from modaltune.train_signals import TrainingStopped

    try:
        run = run_training(read, console=None if as_json else err_console)
    except TrainingStopped as stopped:
        again = shlex.join(["modaltune", *sys.argv[1:]])
        err_console.print(
            f"{stopped}; a checkpoint is written. To go on: {again}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(INTERRUPTED) from None
    if int(os.environ.get("RANK", "0")) > 0:
        return  # the first process speaks for all
    chosen = run.info["chosen"]
    summary = {
        "out": str(read.output.folder),
        "learner": read.learner.kind,
        "epochs": run.info["epochs"],
        "chosen": {name: chosen[name] for name in ("by", "value", "epoch")},
        "busy": run.info["busy"],
        "random_backbone": run.info["random_backbone"],
    }
    if as_json:
        print_json(summary)
        return
    if chosen["by"] is not None:
        name = chosen["by"].replace("_", " ")
        said = f"epoch {chosen['epoch']} of {run.info['epochs']}, validation {name} "
        out_console.print(f"kept {said}{chosen['value']:.3f}", highlight=False)
    if run.info["busy"] is not None:
        out_console.print(f"busy {run.info['busy']:.1%} of the loop's time", highlight=False)
    if run.info["random_backbone"]:
        out_console.print("[yellow]the slide encoder of this model is random, not pretrained[/]")
    out_console.print(f"wrote {read.output.folder}", highlight=False, soft_wrap=True, markup=False)
