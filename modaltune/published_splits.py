"""The JSON of a published split, `{"data": [record, ...]}` per part: read and written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from modaltune.clinical import REFERENCE_NAMES, read_clinical
from modaltune.engine.atomic import write_json_atomic
from modaltune.errors import CohortError
from modaltune.splits import PARTS, Split
from modaltune.tables import is_missing


def read_published_split(
    train: str | Path,
    val: str | Path | None,
    test: str | Path | None,
    *,
    exclude: Collection[str] = (),
) -> tuple[Split, pd.DataFrame]:
    """Read a published split: its parts, and the clinical records that it carries.

    Args:
        train, val, test: `{"data": [...]}` JSON, also .gz or .zip; a part may be None.
        exclude: Cases to leave out.

    Returns:
        The split by case id (`case_submitter_id`), and the rows of all parts together, as
        `modaltune.clinical.read_clinical` gives them.

    Raises:
        CohortError: A file is damaged, or a case is in two parts.
    """
    files = dict(zip(PARTS, (train, val, test), strict=True))
    tables = {
        part: read_clinical(path, exclude=exclude, allow_empty=True)
        for part, path in files.items()
        if path is not None
    }
    split = Split.from_dict({part: list(table.index) for part, table in tables.items()})
    if not split.case_ids:
        raise CohortError(f"{train} and the others must hold at least one case, got none")
    return split, pd.concat([table for table in tables.values() if len(table)])


def write_published_split(
    folder: str | Path,
    split: Split,
    clinical: pd.DataFrame,
    *,
    with_genes: Collection[str] = (),
    features: Mapping[str, Sequence[str]] | None = None,
) -> list[Path]:
    """Write a split as `train.json`, `val.json` and `test.json` in the published layout.

    A case has one record per slide, or one without a slide. What is not known is null.

    Args:
        folder: Where; created if need be.
        split: Which case is in which part.
        clinical: Rows of `modaltune.clinical.read_clinical` of at least these cases.
        with_genes: Cases that have expression (`gene_availability`).
        features: Feature file names of each case's slides, in the order of its `slides`; the
            published name, `<slide>_featvec.pt`, where not given.

    Raises:
        CohortError: A case of the split has no clinical row.
    """
    missing = sorted(set(split.case_ids) - set(map(str, clinical.index)))
    if missing:
        raise CohortError(
            f"clinical must have a row for every case of the split, got none for {len(missing)}, "
            f"such as {', '.join(missing[:5])}; take both from one cases folder"
        )
    genes, written = set(with_genes), []
    for part, cases in split.parts.items():
        records = []
        for case in cases:
            names = (features or {}).get(case)
            records += _records(case, clinical.loc[case].to_dict(), case in genes, names)
        path = Path(folder) / f"{part}.json"
        write_json_atomic(path, {"data": records})
        written.append(path)
    return written


def _records(
    case: str, row: Mapping[Any, Any], has_genes: bool, features: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Return the records of one case, one per slide."""
    shared: dict[str, Any] = {}
    for theirs, ours in REFERENCE_NAMES.items():
        value = case if ours == "case_id" else row.get(ours)
        shared[theirs] = None if is_missing(value) else value
    for name in ("vital_status", "primary_class"):
        shared[name] = None if shared[name] is None else int(shared[name])
    shared["gene_availability"] = int(has_genes)
    slides: tuple[str, ...] = tuple(row["slides"])
    if not slides:
        return [{**shared, "slide_submitter_id": None, "features_path": None}]
    names = features if features and len(features) == len(slides) else None
    return [
        {
            **shared,
            "slide_submitter_id": slide,
            "features_path": names[k] if names else f"{slide}_featvec.pt",
        }
        for k, slide in enumerate(slides)
    ]
