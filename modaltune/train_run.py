"""From a configuration to a trained run folder; run again, it goes on where it stopped.

The folder holds `run.json` and `model.safetensors` (the best epoch by validation), `config.toml`,
`split.json`, `metrics.jsonl` and `checkpoints/`.
"""

from __future__ import annotations

import os

import torch
from rich.console import Console

from modaltune.baseline_run import BaselineRun
from modaltune.checkpoint import DESCRIPTION, save_run
from modaltune.config_text import to_toml
from modaltune.engine.atomic import atomic_path, write_json_atomic
from modaltune.errors import InputError
from modaltune.processes import make_accelerator
from modaltune.run_config import RunConfig
from modaltune.train import fit
from modaltune.train_baseline import finish_baseline
from modaltune.train_checkpoint import load_tuned
from modaltune.train_metrics import MetricsLog, check_loggers
from modaltune.train_prepare import Prepared, prepare
from modaltune.train_progress import TrainProgress
from modaltune.train_signals import StopRequest, stop_on_signals
from modaltune.train_validation import validation_of
from modaltune.train_watcher import RunWatcher
from modaltune.trained_run import TrainedRun

CONFIG, SPLIT, CHECKPOINTS = "config.toml", "split.json", "checkpoints"


def run_training(config: RunConfig, *, console: Console | None = None) -> TrainedRun:
    """Train, or go on training, and write the run folder `config.output.folder`.

    Args:
        config: Everything about the run.
        console: For progress; None for silence.

    Returns:
        The run of the best epoch, as written.

    Raises:
        InputError: A rule is broken; the message says which. `CheckpointError`: the folder holds a
            run of another configuration.
        TrainingStopped: A signal asked to stop; a checkpoint is written.
    """
    out = config.output.folder
    if (out / DESCRIPTION).is_file():
        raise InputError(
            f"output.folder must not hold a finished run, got {out}; choose another folder, or "
            "evaluate that run"
        )
    check_loggers(tensorboard=config.output.tensorboard, wandb=config.output.wandb)
    device = device_of(config)
    with stop_on_signals() as stop:
        prepared = prepare(config)
        run, learner = prepared.run, prepared.learner
        learner.model.to(device)
        accelerator = make_accelerator(learner, config.training)
        shown = console if accelerator.is_main_process else None
        watcher = _watcher(prepared, stop, shown)
        try:
            log = fit(
                learner, prepared.train, config.training, watcher=watcher, accelerator=accelerator
            )
        except BaseException:
            watcher.close()
            raise
        clock = watcher.clock
        watcher.finish(log)
    accelerator.wait_for_everyone()
    best = watcher.best()
    if best is not None:
        load_tuned(learner.model, best)
    busy = clock.busy if clock.wall_s else None  # all steps were done by a run before
    run.info |= {"epochs": len(log), "chosen": vars(watcher.choice), "busy": busy}
    if accelerator.is_main_process:
        if isinstance(run, BaselineRun):
            finish_baseline(run, prepared.train, config.training.cases_per_batch)
        run.model.to("cpu").eval()
        save_run(out, run)
    accelerator.wait_for_everyone()
    return run


def _watcher(prepared: Prepared, stop: StopRequest, console: Console | None) -> RunWatcher:
    output = prepared.config.output

    def open_metrics(steps: int) -> MetricsLog:
        board, project = output.tensorboard, output.wandb
        return MetricsLog(
            output.folder, tensorboard=board, wandb=project, until=steps,
            config=prepared.config.model_dump(mode="json"),
        )  # fmt: skip

    return RunWatcher(
        prepared.config,
        output.folder / CHECKPOINTS,
        prepared.facts,
        lambda: _describe(prepared),
        open_metrics,
        validation_of(prepared),
        prepared.train.slide_counts,
        stop,
        TrainProgress(console),
    )


def device_of(config: RunConfig) -> torch.device:
    """Return the device that a run trains on; of several processes each has its own.

    Raises:
        InputError: cuda is asked for and there is none.
    """
    wanted = config.training.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("training.device must be one of this machine, got cuda; use cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _describe(prepared: Prepared) -> None:
    """Write what the run is: its configuration, as it goes on, and its split."""
    out = prepared.config.output.folder
    with atomic_path(out / CONFIG) as temporary:
        temporary.write_text(to_toml(prepared.config), encoding="utf-8")
    write_json_atomic(out / SPLIT, prepared.pooled.split.to_dict())
