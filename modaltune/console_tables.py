"""Tables the command line prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from modaltune.engine.ledger_report import SetStatus

if TYPE_CHECKING:
    import pandas as pd

    from modaltune.engine.folder import EmbedReport

STATUS_STYLE = {
    "done": "green",
    "kept": "cyan",
    "empty": "yellow",
    "failed": "bold red",
    "quarantined": "bold red",
    "running": "cyan",
    "pending": "dim",
}
LEASE_STYLE = {"alive": "green", "gone": "yellow", "expired": "yellow"}


def slide_table(info: Mapping[str, Any]) -> Table:
    """Return what `slide_info` found about one slide, or why it can't be read."""
    table = Table(title=escape(info["path"]), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if "error" in info:
        table.add_row("error", f"[red]{escape(info['error'])}[/]")
        return table
    width, height = info["dimensions"]
    mpp = info["mpp"]
    if mpp:
        table.add_row("resolution", f"{mpp:.4f} mpp ({info['mpp_source']})")
        table.add_row("size", f"{width} x {height} px, {width * mpp / 1e3:.2f} x "
                              f"{height * mpp / 1e3:.2f} mm")  # fmt: skip
    else:
        table.add_row("resolution", f"[yellow]{escape(info['mpp_problem'])}[/]")
        table.add_row("size", f"{width} x {height} px")
    levels = ", ".join(
        f"{v['width']} x {v['height']} (1:{v['downsample']:g})" for v in info["levels"]
    )
    table.add_row("levels", levels)
    table.add_row("reader", f"{info['library']} on the {info['device']}")
    table.add_row("format", f"{info['vendor']}, {info['compression'] or 'plain image'}")
    if info["tile_px"]:
        table.add_row("file tiles", " x ".join(map(str, info["tile_px"])) + " px")
    table.add_row("file", f"{info['bytes'] / 1e6:.1f} MB")
    if info["associated_images"]:
        table.add_row("images", escape(", ".join(info["associated_images"])))
    return table


def outcome_table(report: EmbedReport, most: int = 40) -> Table:
    """Return the outcome of every slide; of a long list, all that did not go well and the rest."""
    table = Table(title=escape(f"Slides, tile encoder {report.encoder}"), title_justify="left")
    for column in ("slide", "status", "tiles", "seconds", "reader", "note"):
        numeric = column in ("tiles", "seconds")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    ordered = sorted(report.outcomes, key=lambda o: o.status in ("done", "kept"))
    shown = report.outcomes if len(ordered) <= most else ordered[:most]
    for outcome in shown:
        style = STATUS_STYLE[outcome.status]
        table.add_row(
            escape(outcome.slide_id),
            f"[{style}]{outcome.status}[/]",
            str(outcome.tiles),
            f"{outcome.seconds:.1f}",
            outcome.reader,
            escape(outcome.reason),
        )
    if len(shown) < len(ordered):
        table.add_row(f"and {len(ordered) - len(shown)} more", "", "", "", "", "")
    return table


def stage_table(report: EmbedReport) -> Table:
    """Return where the time went, and the rate."""
    table = Table(title="Time", title_justify="left")
    for column in ("stage", "seconds", "share"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    total = report.elapsed_s or 1.0
    for stage, seconds in report.stages_s.items():
        table.add_row(stage, f"{seconds:.2f}", f"{100 * seconds / total:.0f} %")
    table.add_section()
    rate = report.new_tiles / total
    table.add_row("all", f"{report.elapsed_s:.2f}", f"{rate:.1f} tiles/s")
    return table


def status_tables(sets: Sequence[SetStatus], most: int = 40) -> Iterator[Table]:
    """Return what a ledger says: per encoder its counts, who is at work, and what failed."""
    for one in sets:
        yield _count_table(one)
        if one.running:
            yield _lease_table(one)
        if one.problems:
            yield _problem_table(one, most)


def _count_table(one: SetStatus) -> Table:
    table = Table(title=escape(one.features), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for status, count in one.counts.items():
        style = STATUS_STYLE[status] if count else "dim"
        table.add_row(status, f"[{style}]{count}[/]")
    table.add_section()
    table.add_row("tiles", str(one.tiles))
    rate = "not known yet" if one.slides_per_h is None else f"{one.slides_per_h:.1f}"
    table.add_row("slides/h", rate)
    table.add_section()
    for setting, value in one.recipe.items():
        table.add_row(escape(setting), escape(str(value)))
    return table


def _lease_table(one: SetStatus) -> Table:
    table = Table(title=f"At work for {escape(one.features)}", title_justify="left")
    for column in ("slide", "host", "process", "minutes", "silent, s", "state"):
        numeric = column in ("process", "minutes", "silent, s")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for lease in one.running:
        table.add_row(
            escape(lease.slide_id),
            escape(lease.host),
            str(lease.pid),
            f"{lease.age_s / 60:.1f}",
            f"{lease.silent_s:.0f}",
            f"[{LEASE_STYLE[lease.state]}]{lease.state}[/]",
        )
    return table


def _problem_table(one: SetStatus, most: int) -> Table:
    table = Table(title=f"Not embedded in {escape(one.features)}", title_justify="left")
    for column in ("slide", "status", "attempts", "reason"):
        table.add_column(
            column, justify="right" if column == "attempts" else "left", overflow="fold"
        )
    for row in one.problems[:most]:
        style = STATUS_STYLE[row.status]
        table.add_row(
            escape(row.slide_id),
            f"[{style}]{row.status}[/]",
            str(row.attempts),
            escape(row.reason),
        )
    if len(one.problems) > most:
        table.add_row(f"and {len(one.problems) - most} more, all with --json", "", "", "")
    return table


def frame_table(frame: pd.DataFrame, title: str) -> Table:
    """Return a data frame as a table; fractions get three decimals."""
    table = Table(title=escape(title), title_justify="left")
    for name in frame.columns:
        table.add_column(escape(str(name).replace("_", " ")), overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else escape(str(v)) for v in row))
    return table


def headline_tables(headline: pd.DataFrame) -> Iterator[Table]:
    """Return the main metrics as a table per run and scope: a row per metric, a column per task."""
    if headline.empty:  # without rows it has no columns to group by, either
        return
    for (run, scope), rows in headline.groupby(["run", "scope"], sort=False):
        turned = rows.drop(columns=["run", "scope"]).set_index("task").T
        kept = turned[(turned != "").any(axis=1)]
        kept = kept.rename(index=lambda name: str(name).replace("_", " "))
        place = "" if scope == "pooled" else f", {scope}"
        yield frame_table(kept.reset_index(names=""), f"{run}{place}: test cases")


def comparison_tables(comparison: pd.DataFrame) -> Iterator[Table]:
    """Return differences as a table per pair of runs and scope, like `headline_tables`."""
    for (first, second, scope), rows in comparison.groupby(
        ["first", "second", "scope"], sort=False
    ):
        metric = rows["metric"].where(rows["kind"] != "site", "site_" + rows["metric"])
        told = rows.assign(metric=metric.str.replace("_", " "), cell=rows.apply(_gap, axis=1))
        kept = told.pivot_table(
            index="metric", columns="task", values="cell", aggfunc="first", sort=False,
            fill_value="",
        )  # fmt: skip
        place = "" if scope == "pooled" else f", {scope}"
        title = f"{first} minus {second}{place}: test cases, seeds {rows['seeds'].iloc[0]}"
        yield frame_table(kept.rename_axis(columns=None).reset_index(names=""), title)


def _gap(row: pd.Series) -> str:
    """Write a difference with its interval and p value."""
    if math.isnan(row["difference"]):
        return "not compared" if "not compared" in row["note"] else "undefined"
    text = f"{row['difference']:+.3f}"
    if not math.isnan(row["low"]):
        text += f" ({row['low']:+.3f} to {row['high']:+.3f}), p {row['p_bootstrap']:.3f}"
    return text
