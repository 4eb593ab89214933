"""Names that tell compared runs and tables of predictions apart, and what is one of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modaltune.errors import InputError
from modaltune.tables import name_few, repeated

TABLES = (".csv", ".parquet", ".pq")  # of predictions, where a run folder could stand


def check_distinct(side: Sequence[Path]) -> None:
    """Refuse a run that stands for several seeds.

    Raises:
        InputError: A run is given twice.
    """
    if twice := repeated([str(path.resolve()) for path in side]):
        raise InputError(
            f"seeds must be different runs, got {name_few(twice)} more than once; give each once"
        )


def names_of_runs(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each run, its own for each path.

    Args:
        folders: Run folders, and tables of predictions; one may be given several times.

    Returns:
        The end of each path that no other one has, without the suffix of a table where it can be
        spared: `run`, or `a/run` and `b/run`.
    """
    own = [path.resolve() for path in folders]
    parts = {p: (*p.parts[1:-1], p.stem if p.suffix in TABLES else p.name) for p in own}
    taken = list(parts.values())
    parts = {p: name if taken.count(name) == 1 else p.parts[1:] for p, name in parts.items()}
    return [_short(parts[path], [n for p, n in parts.items() if p != path]) for path in own]


def _short(own: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    apart = (k for k in range(1, len(own)) if all(o[-k:] != own[-k:] for o in others))
    return "/".join(own[-next(apart, len(own)) :])
