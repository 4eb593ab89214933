"""The GDC's follow-up table: days on which a patient was last seen.

Since 2025 `clinical.tsv` of the portal has no `days_to_last_follow_up` for most patients; the days
stand in `follow_up.tsv` of the same download, a row per visit, as `follow_ups.days_to_follow_up`
(older downloads: `days_to_follow_up`).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from modaltune.clinical_gdc import CASE_ID_COLUMNS, as_days, case_rows, known_text
from modaltune.errors import CohortError
from modaltune.tables import name_few, open_text, read_header

_DAYS_COLUMNS = ("follow_ups.days_to_follow_up", "days_to_follow_up")
_KIND = "a readable follow-up table (follow_up.tsv of the GDC)"


def is_follow_up_header(header: Collection[str]) -> bool:
    """Tell whether columns are those of the follow-up table, which knows no vital status."""
    has_status = any(name.rpartition(".")[2] == "vital_status" for name in header)
    return not has_status and any(name in header for name in _DAYS_COLUMNS)


def read_follow_ups(path: str | Path, exclude: Collection[str] = ()) -> dict[str, set[float]]:
    """Read the days after the index date on which each case was seen.

    Args:
        path: `follow_up.tsv`, also as .gz or as the only file of a .zip.
        exclude: Cases to leave unread.

    Returns:
        Case barcode -> days; cases whose rows name no day are there with an empty set.

    Raises:
        CohortError: The file is damaged or has other columns, or a row names no case.
        InputError: A day is no number.
    """
    path = Path(path)
    days: dict[str, set[float]] = {}
    with open_text(path, _KIND) as text:
        header, delimiter = read_header(text, path)
        keys = [name for name in CASE_ID_COLUMNS if name in header]
        columns = [name for name in _DAYS_COLUMNS if name in header]
        if not keys or not columns:
            raise CohortError(
                f"{path} must have a column of {' or '.join(CASE_ID_COLUMNS)} and one of "
                f"{' or '.join(_DAYS_COLUMNS)}, got {name_few(header, 12)}; give follow_up.tsv of "
                "the GDC's clinical download"
            )
        for case, cells in case_rows(text, path, header, delimiter, keys[0], exclude):
            own = days.setdefault(case, set())
            if known_text(cells[columns[0]]) is not None:
                own.add(as_days(cells[columns[0]], "days to a follow-up", case, path))
    return days
