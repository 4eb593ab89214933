"""Commands that look ahead and look inside: `modaltune plan` and `modaltune profile`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from modaltune.cli_parts import (
    FAILED,
    JsonFlag,
    err_console,
    out_console,
    print_json,
    reports_errors,
)
from modaltune.engine.atomic import write_json_atomic

if TYPE_CHECKING:
    from modaltune.model import ModalTune

Mode = Literal["forward", "train"]
TOP = 12  # rows of the operator table on screen; the JSON has all


@reports_errors
def plan(
    tiles: Annotated[int, typer.Option(min=2, help="Tiles of the largest case.")],
    mode: Annotated[
        Literal["forward", "train"] | None, typer.Option(help="One of the two; both if not set.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="GiB that may be used; what is free now if not set.", metavar="GIB"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda on a machine that has one.")] = "cpu",
    run: Annotated[
        Path | None, typer.Option(help="Run folder; the published size if not set.")
    ] = None,
    task_trunk: Annotated[
        Literal["separate", "shared", "any"] | None,
        typer.Option(help="Choose among these; that of the run (separate) if not set."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Predict peak memory of a forward pass and a training step, and say which setting fits.

    Memory grows in a straight line with tiles. Settings trade it against time: task_trunk=shared
    serves all tasks in one pass (another model: tune it that way); task_backward=sequential keeps
    the activations of one task at a time; recompute=layer or interaction computes them again in
    the backward pass. A few layers are run to count what they hold: some seconds. Exits 1 when
    nothing fits.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler looks for a GPU, and complains
    from modaltune import plan_report

    report = plan_report.plan(
        tiles, mode=mode, budget_gib=budget, device=device, run=run, task_trunk=task_trunk
    )
    if as_json:
        print_json(report.to_dict())
    else:
        report.render(out_console)
    if not all(report.choice.values()):
        raise typer.Exit(FAILED)


@reports_errors
def profile(
    tiles: Annotated[int, typer.Option(min=1, help="Tiles of the case.")] = 4000,
    mode: Annotated[Mode, typer.Option(help="A forward pass, or one training step.")] = "forward",
    run: Annotated[
        Path | None,
        typer.Option(help="Run folder to profile.", show_default="published size, random weights"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of products and attention; auto: bfloat16 on a GPU, float32 elsewhere."),
    ] = "auto",
    config: Annotated[
        Path | None,
        typer.Option(
            help="Configuration of `modaltune train`: how busy its loop is on its cases, instead.",
            metavar="TOML",
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change one field of --config, may be repeated.", metavar="KEY.SUB=VALUE"
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=2, help="Training steps to take of --config; the first is not timed.")
    ] = 50,
    out: Annotated[Path, typer.Option(help="Folder for trace, table and picture.")] = Path(
        "modaltune-profile"
    ),
    as_json: JsonFlag = False,
) -> None:
    """Say where the time goes: by stage, by operator or kernel, and how much of it is idle.

    Runs one case of random tiles and all task prompts; time depends on sizes, not on values.
    Writes OUT/trace.json (open it in chrome://tracing or Perfetto), OUT/profile.json and
    OUT/stages.png. Stages carry the same names in Nsight Systems (NVTX).

    --config trains --steps steps on the cases themselves, writing no run, and says how much of the
    loop's time is computing and how much waiting for data (OUT/loop.json).
    """
    if config is not None:
        _profile_loop(config, sets or (), steps, run, out, as_json)
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop lines are no news
    from modaltune import profile_report as report

    model = _model(run, device)
    out.mkdir(parents=True, exist_ok=True)
    training, tasks = mode == "train", len(model.config.tasks)
    if precision == "auto":
        precision = "bfloat16" if device.startswith("cuda") else "float32"
    if not as_json:
        err_console.print(f"profiling: {mode}, {tiles:,} tiles, {tasks} tasks, on {device} ...")
    found = report.profile_model(
        model,
        tiles,
        training=training,
        device=device,
        precision=precision,
        trace=out / "trace.json",
    )
    limit = report.limit_of(found.device, training=training)
    rows = report.stage_rows(found, report.stage_work(model, tiles, training=training), limit)
    about = {"mode": mode, "tiles": tiles, "tasks": tasks, "precision": precision}
    result = {
        **about,
        **found.to_dict(),
        "limit": None if limit is None else asdict(limit),
        "stages": rows,
    }
    write_json_atomic(out / "profile.json", result)
    title = f"{mode}, {tiles:,} tiles, {tasks} tasks: {found.seconds:.2f} s on {found.device.name}"
    report.stage_picture(rows, title, out / "stages.png")
    if as_json:
        print_json(result)
        return
    out_console.print(report.stage_table(rows, title))
    out_console.print(report.operator_table(found, TOP))
    known = "unknown for this device" if limit is None else limit.describe()
    out_console.print(f"idle {found.idle_share:.1%}; limit: {known}", highlight=False)
    for name in ("trace.json", "profile.json", "stages.png"):
        out_console.print(f"wrote {out / name}", highlight=False, soft_wrap=True)


def _profile_loop(
    config: Path, sets: Sequence[str], steps: int, run: Path | None, out: Path, as_json: bool
) -> None:
    from modaltune.errors import InputError
    from modaltune.profile_loop import loop_table, measure_loop
    from modaltune.run_config import load_run_config

    if run is not None:
        raise InputError(
            f"--run must not stand beside --config, got {run}; the loop begins a model of its own"
        )
    found = measure_loop(load_run_config(config, sets=sets), steps)
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / "loop.json", found)
    if as_json:
        print_json(found)
        return
    out_console.print(loop_table(found))
    rates = f"{found['cases_per_s']:.3g} cases/s, {found['tiles_per_s']:,.0f} tiles/s"
    out_console.print(f"busy {found['busy']:.1%}; {rates}", highlight=False)
    out_console.print(f"wrote {out / 'loop.json'}", highlight=False, soft_wrap=True, markup=False)


def _model(run: Path | None, device: str) -> ModalTune:
    from modaltune.engine.device import device_facts

    device_facts(device)  # an unknown device is said before anything is loaded
    if run is None:
        from modaltune.published_size import published_size_model

        return published_size_model().to(device)
    from modaltune.checkpoint import load_run

    return load_run(run, device=device).model
