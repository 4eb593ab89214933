"""The sub-commands of `modaltune bench`. Heavy modules load inside each command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from modaltune.benchmarks.decode_command import decode as decode_command
from modaltune.benchmarks.encoders_command import encoders as encoders_command
from modaltune.benchmarks.model_command import model as model_command
from modaltune.benchmarks.stream_command import stream as stream_command
from modaltune.benchmarks.throughput_command import throughput as throughput_command
from modaltune.cli_parts import FAILED, JsonFlag, print_json, reports_errors

if TYPE_CHECKING:
    from modaltune.benchmarks.kernel_runs import Case, Plan
    from modaltune.benchmarks.kernel_spec import OpSpec

bench_app = typer.Typer(
    help="Time kernels, model, decoding, encoders and the stream, or model what they cost.",
    no_args_is_help=True,
)


@bench_app.callback()
def _bench() -> None:
    """Keep `bench` a group however few commands it has."""


@bench_app.command()
@reports_errors
def kernels(
    model: Annotated[
        bool, typer.Option("--model", help="Model the cost on four GPUs instead of timing.")
    ] = False,
    op: Annotated[
        list[str] | None, typer.Option(help="Only this op's folder; may be given again.")
    ] = None,
    tiles: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tiles; may be given again.", show_default="1000; 10000 on a GPU"),
    ] = None,
    mode: Annotated[
        Literal["forward", "backward", "both"], typer.Option(help="What to time.")
    ] = "both",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where; a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        typer.Option(help="Of the tensors; bfloat16 on a GPU, float32 on the CPU."),
    ] = "auto",
    seconds: Annotated[float, typer.Option(min=0, help="Of timing per op, mode and size.")] = 10.0,
    compile_seconds: Annotated[
        float, typer.Option(min=0, help="That torch.compile may take per op; 0 leaves it out.")
    ] = 120.0,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of kernels.csv.", show_default="benchmarks/results if it exists"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for plots.")] = Path("modaltune-bench"),
    as_json: JsonFlag = False,
) -> None:
    """Time each op against its eager reference, torch.compile of it, and libraries.

    Answers are checked first: a wrong one is not timed, and exits 1 if it is ours. With --model
    nothing runs: FLOPs, bytes and roofs on A100, H100, B200 and RTX 4090.
    """
    if model:
        _model(tiles, out, as_json)
        return
    _measure(
        _chosen_specs(op), mode, tiles, _plan(device, dtype, seconds, compile_seconds),
        results, out, as_json,
    )  # fmt: skip


def _model(tiles: list[int] | None, out: Path, as_json: bool) -> None:
    from rich.console import Console

    from modaltune.benchmarks.kernel_plots import plot_rooflines
    from modaltune.benchmarks.kernel_tables import (
        TILES,
        modelled_json,
        modelled_rows,
        print_modelled,
        whole_models,
        wide,
    )

    sizes = sorted(set(tiles or TILES))
    rows, sums = modelled_rows(sizes), whole_models(sizes)
    out.mkdir(parents=True, exist_ok=True)
    picture = plot_rooflines(rows, sizes[-1], out / "kernels_roofline.png")
    if as_json:
        print_json({**modelled_json(rows, sums), "plots": [str(picture)]})
        return
    console = wide(Console())
    print_modelled(console, rows, sums)
    console.print(f"wrote {picture}", highlight=False, soft_wrap=True)


def _chosen_specs(ops: list[str] | None) -> list[OpSpec]:
    from modaltune.benchmarks.kernel_spec import all_specs
    from modaltune.engine.errors import InputError

    specs = all_specs()
    known = sorted({spec.op for spec in specs})
    unknown = sorted(set(ops or ()) - set(known))
    if unknown:
        raise InputError(f"--op must be one of {', '.join(known)}, got {', '.join(unknown)}")
    return [spec for spec in specs if not ops or spec.op in ops]


def _plan(device: str, dtype: str, seconds: float, compile_seconds: float) -> Plan:
    import torch

    from modaltune.benchmarks.kernel_runs import Plan
    from modaltune.engine.errors import InputError

    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise InputError("--device must be cpu on a machine without a GPU, got cuda")
    where = torch.device("cuda" if has_gpu and device != "cpu" else "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if where.type == "cuda" else "float32"
    return Plan(where, getattr(torch, dtype), seconds, compile_seconds)


def _measure(
    specs: list[OpSpec],
    mode: str,
    tiles: list[int] | None,
    plan: Plan,
    results: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    from rich.console import Console

    from modaltune.benchmarks.harness import append_row, results_folder
    from modaltune.benchmarks.kernel_plots import plot_results
    from modaltune.benchmarks.kernel_runs import CSV_NAME, device_name, rows_of
    from modaltune.benchmarks.kernel_tables import not_timed, print_case, wide
    from modaltune.benchmarks.kernel_timing import better, roof_of

    folder = results_folder(results)
    roof = roof_of(plan.device, plan.dtype)
    console = wide(Console(stderr=as_json))
    cases, rows = [], []
    for case in _cases(specs, mode, tiles, plan):
        roof = better(roof, roof_of(plan.device, plan.dtype))
        print_case(console, case, roof)
        cases.append(case)
        new = rows_of(case, plan, roof)
        rows += new
        if folder is not None:
            for row in new:
                append_row(folder / CSV_NAME, row)
    said = roof.source if roof else "unknown"
    console.print(f"{device_name(plan.device)}; roof {said}", highlight=False, soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    picture = plot_results(rows, out / "kernels_measured.png")
    if as_json:
        found = {"device": device_name(plan.device), "roof": said, "rows": rows}
        print_json({**found, "not_timed": not_timed(cases), "plots": [str(picture)]})
    else:
        console.print(f"wrote {picture}", highlight=False, soft_wrap=True)
    if any(one["wrong"] and one["impl"] == "ours" for one in not_timed(cases)):
        raise typer.Exit(FAILED)


def _cases(specs: list[OpSpec], mode: str, tiles: list[int] | None, plan: Plan) -> Iterator[Case]:
    from modaltune.benchmarks.kernel_runs import run_case

    default = 10_000 if plan.device.type == "cuda" else 1_000
    for spec in specs:
        sizes = sorted({min(count, spec.most_tiles) for count in tiles or [default]})
        for one in spec.modes:
            if mode in (one, "both"):
                for size in sizes:
                    yield run_case(spec, one, size, plan)


bench_app.command("model")(reports_errors(model_command))
bench_app.command("encoders")(encoders_command)
bench_app.command("decode")(reports_errors(decode_command))
bench_app.command("stream")(reports_errors(stream_command))
bench_app.command("throughput")(reports_errors(throughput_command))
