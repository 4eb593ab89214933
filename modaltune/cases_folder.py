"""A cases folder: one validated cohort on disk, as Parquet and JSON, with its splits.

====================  ==========================================================================
`cases.json`          format, sources with SHA-256, options, policies, classes, counts, and the
                      SHA-256 of every file below
`clinical.parquet`    a row per case, sorted by id; columns `modaltune.clinical.COLUMNS`
`expression.parquet`  a row per case that has expression, a float32 column per gene
`pathways.parquet`    a row per membership: pathway, gene
`slides.parquet`      a row per feature file: case, slide, root and path below it, tiles, width, ...
`splits.json`         a list of folds, each with the cases of train, val and test
`report.json`, `.md`  what was joined, what was dropped and why
====================  ==========================================================================

Rows and columns are sorted, so that the files do not depend on the order of anything read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from modaltune.cases import Cohort, SlideReading
from modaltune.clinical import COLUMNS
from modaltune.engine.atomic import atomic_folder, write_json_atomic
from modaltune.engine.feature_index import import_pt
from modaltune.errors import CohortError, FeatureFileError
from modaltune.pathways import PathwayTable
from modaltune.splits import Split, read_splits, splits_state
from modaltune.tables import name_few, naming_damage, repeated

CASES_FORMAT, FORMAT_VERSION = "modaltune.cases", 1
DESCRIPTION, REPORT_JSON, REPORT_MD = "cases.json", "report.json", "report.md"
CLINICAL, EXPRESSION, PATHWAYS = "clinical.parquet", "expression.parquet", "pathways.parquet"
SLIDES, SPLITS = "slides.parquet", "splits.json"
_REPORTS = (REPORT_JSON, REPORT_MD)

_NUMBERS = {"age": pa.float64(), "survival_months": pa.float64(), "event": pa.float64()}
_CLINICAL_SCHEMA = pa.schema(
    [("case_id", pa.string())]
    + [(name, _NUMBERS.get(name, pa.string())) for name in COLUMNS if name not in
       ("primary_class", "slides")]
    + [("primary_class", pa.int64()), ("slides", pa.list_(pa.string()))]
)  # fmt: skip
_SLIDES_SCHEMA = pa.schema(
    [
        ("case_id", pa.string()),
        ("slide", pa.string()),
        ("root", pa.string()),
        ("features", pa.string()),
        ("producer", pa.string()),
        ("encoder", pa.string()),
        ("tiles", pa.int64()),
        ("width", pa.int64()),
        ("base_mpp", pa.float64()),
        ("target_mpp", pa.float64()),
    ]
)


SLIDE_COLUMNS = tuple(_SLIDES_SCHEMA.names)


@dataclass(frozen=True)
class CasesContent:
    """Everything a cases folder is written from; ids are joined already.

    Attributes:
        clinical: One row per case of the folder, index case ids, columns `COLUMNS`.
        expression: Case x gene of the cases that have it, or None.
        pathways: Or None.
        slides: `SLIDE_COLUMNS`, or None. `features` is relative to `root`, and `root` is a folder,
            or empty for the cases folder itself. A column `source` names the `.pt` file that is
            to be imported as `features`.
        splits: At least one.
        facts: What goes into `cases.json` beside the files' checksums: sources, options, ...
        report: `report.json`.
        report_md: `report.md`.
    """

    clinical: pd.DataFrame
    expression: pd.DataFrame | None
    pathways: PathwayTable | None
    slides: pd.DataFrame | None
    splits: Sequence[Split]
    facts: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    report_md: str = ""

    def check(self) -> None:
        """Refuse content whose parts contradict each other.

        Raises:
            CohortError: A case is repeated, or known to one part and not to the clinical table.
        """
        ids = list(map(str, self.clinical.index))
        known = set(ids)
        others: dict[str, list[str]] = {
            f"split {number}": list(split.case_ids) for number, split in enumerate(self.splits)
        }
        if self.expression is not None:
            others["expression"] = list(map(str, self.expression.index))
        if self.slides is not None:
            others["slides"] = sorted(set(map(str, self.slides["case_id"])))
        for what, cases in {"clinical": ids, **others}.items():
            strangers = sorted(set(cases) - known)
            if repeated(cases) or strangers:
                raise CohortError(
                    f"{what} must name every case once, and only cases of the clinical table, got "
                    f"repeated {name_few(repeated(cases)) or 'none'}, unknown "
                    f"{name_few(strangers) or 'none'}; join by case id first"
                )
        if not ids or not self.splits:
            raise CohortError(
                f"a cases folder must hold at least one case and one split, got {len(ids)} and "
                f"{len(self.splits)}; check what was joined"
            )


@dataclass(frozen=True)
class CasesFolder:
    """An opened cases folder; its tables are read on first use.

    Attributes:
        path: The folder.
        description: `cases.json`.
        features_root: Where the feature files lie now, when their folder was moved.
    """

    path: Path
    description: dict[str, Any]
    features_root: Path | None = None

    @classmethod
    def open(
        cls, path: str | Path, *, verify: bool = True, features: str | Path | None = None
    ) -> CasesFolder:
        """Open a folder that `modaltune cases build` wrote.

        Args:
            path: The folder.
            verify: Compare every file with its recorded SHA-256.
            features: Folder of the feature files, if they were moved since.

        Raises:
            CohortError: No cases folder, of another version, or changed since it was written.
        """
        folder = Path(path)
        with naming_damage(folder / DESCRIPTION, "the description of a cases folder"):
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        wanted = (CASES_FORMAT, FORMAT_VERSION)
        if (description.get("format"), description.get("format_version")) != wanted:
            raise CohortError(
                f"{folder} must be a cases folder of version {FORMAT_VERSION}, got "
                f"{description.get('format')!r} {description.get('format_version')!r}; build it "
                "with: modaltune cases build"
            )
        if verify:
            for name, digest in description["files"].items():
                if not (folder / name).is_file() or file_sha256(folder / name) != digest:
                    raise CohortError(
                        f"{folder / name} must be as it was built, got a file that is "
                        f"{'changed' if (folder / name).is_file() else 'missing'}; build the cases "
                        "folder again"
                    )
        return cls(folder, description, None if features is None else Path(features))

    @property
    def sha256(self) -> str:
        """Hash of tables and splits: the same wherever they came from, in any order of rows."""
        files = {k: v for k, v in self.description["files"].items() if k not in _REPORTS}
        text = json.dumps(files, sort_keys=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    @cached_property
    def clinical(self) -> pd.DataFrame:
        """A row per case, sorted by id: index `case_id`, columns `modaltune.clinical.COLUMNS`."""
        table = pq.read_table(self.path / CLINICAL).to_pandas().set_index("case_id")
        table["slides"] = [tuple(slides) for slides in table["slides"]]
        return table[list(COLUMNS)]

    @cached_property
    def expression(self) -> pd.DataFrame | None:
        """Case x gene, float32, of the cases that have it; None without."""
        if EXPRESSION not in self.description["files"]:
            return None
        return pq.read_table(self.path / EXPRESSION).to_pandas().set_index("case_id")

    @cached_property
    def pathways(self) -> PathwayTable | None:
        """The pathways, sorted by name, each with its genes sorted; None without."""
        if PATHWAYS not in self.description["files"]:
            return None
        table = pq.read_table(self.path / PATHWAYS).to_pandas()
        genes = table.groupby("pathway", sort=True)["gene"].apply(tuple)
        return PathwayTable(tuple(genes.index), tuple(genes))

    @cached_property
    def slides(self) -> pd.DataFrame:
        """A row per feature file: the columns of `slides.parquet`, and `path`."""
        if SLIDES not in self.description["files"]:
            return _SLIDES_SCHEMA.empty_table().to_pandas().assign(path=pd.Series(dtype=object))
        table = pq.read_table(self.path / SLIDES).to_pandas()
        for name in table["features"]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise CohortError(
                    f"{self.path / SLIDES} must name features below their folder, got {name}; "
                    "build the cases folder again"
                )
        moved = self.features_root
        table["path"] = [
            (self.path if not root else moved or Path(root)) / name
            for root, name in zip(table["root"], table["features"], strict=True)
        ]
        return table

    @cached_property
    def cohort(self) -> Cohort:
        """The cohort: feature files, expression and clinical rows, by case."""
        slides: dict[str, tuple[Path, ...]] = {}
        reading: dict[Path, SlideReading] = {}
        rows: list[dict[Any, Any]] = self.slides.to_dict(orient="records")
        for row in rows:
            slides[row["case_id"]] = (*slides.get(row["case_id"], ()), row["path"])
            if row["producer"] != "modaltune":  # our files say everything themselves
                base, target = (_number(row[name]) for name in ("base_mpp", "target_mpp"))
                reading[row["path"]] = SlideReading(base, target, row["encoder"])
        return Cohort(slides, self.expression, self.clinical, reading)

    @property
    def case_ids(self) -> tuple[str, ...]:
        """All cases, sorted."""
        return tuple(self.clinical.index)

    @cached_property
    def _splits(self) -> tuple[Split, ...]:
        return read_splits(self.path / SPLITS)

    @property
    def num_folds(self) -> int:
        """Number of splits."""
        return len(self._splits)

    def split(self, fold: int = 0) -> Split:
        """Return the cases of training, validation and test.

        Raises:
            CohortError: There is no such fold.
        """
        if not 0 <= fold < self.num_folds:
            raise CohortError(
                f"fold must be in 0..{self.num_folds - 1}, as {self.path} was built, got {fold}; "
                "build it with more --folds"
            )
        return self._splits[fold]

    @cached_property
    def report(self) -> dict[str, Any]:
        """`report.json`: what was joined, what was dropped and why."""
        state: dict[str, Any] = json.loads((self.path / REPORT_JSON).read_text(encoding="utf-8"))
        return state


def write_cases_folder(
    path: str | Path, content: CasesContent, *, replace: bool = False
) -> CasesFolder:
    """Write a cases folder, whole or not at all, and open it.

    Args:
        path: The folder; it must not exist unless `replace`.
        content: What to write; checked first.
        replace: Replace an existing cases folder (and nothing else).

    Raises:
        CohortError: Something is there already, or parts of the content contradict each other.
    """
    content.check()
    folder = Path(path)
    if folder.exists() and not (replace and (folder / DESCRIPTION).is_file()):
        raise CohortError(
            f"{folder} must not exist yet, or be a cases folder to replace, got "
            f"{'a cases folder' if (folder / DESCRIPTION).is_file() else 'something else'}; "
            "choose another --out, or give --replace for a cases folder"
        )
    with atomic_folder(folder, replace=replace) as temp:
        _write_tables(temp, content)
        write_json_atomic(temp / SPLITS, splits_state(content.splits))
        write_json_atomic(temp / REPORT_JSON, dict(content.report))
        (temp / REPORT_MD).write_text(content.report_md, encoding="utf-8")
        files = {file.name: file_sha256(file) for file in sorted(temp.iterdir()) if file.is_file()}
        description = {
            **content.facts,
            "format": CASES_FORMAT,
            "format_version": FORMAT_VERSION,
            "software_version": importlib.metadata.version("modaltune"),
            "files": files,
        }
        write_json_atomic(temp / DESCRIPTION, description)
    return CasesFolder.open(folder)


def _write_tables(folder: Path, content: CasesContent) -> None:
    """Write the Parquet files, sorted."""
    clinical = content.clinical.sort_index().rename_axis("case_id").reset_index()
    clinical["slides"] = [sorted(slides) for slides in clinical["slides"]]
    _write_parquet(folder / CLINICAL, clinical, _CLINICAL_SCHEMA)
    if content.expression is not None:
        genes = content.expression.sort_index(axis=0).sort_index(axis=1)
        arrays = [pa.array(genes.index.astype(str)), *(pa.array(genes[g]) for g in genes.columns)]
        table = pa.table(arrays, names=["case_id", *map(str, genes.columns)])
        pq.write_table(table, folder / EXPRESSION, use_dictionary=False, write_statistics=False)
    if content.pathways is not None:
        sets = zip(content.pathways.names, content.pathways.genes, strict=True)
        rows = sorted((name, gene) for name, genes in sets for gene in genes)
        schema = pa.schema([("pathway", pa.string()), ("gene", pa.string())])
        _write_parquet(folder / PATHWAYS, pd.DataFrame(rows, columns=schema.names), schema)
    if content.slides is not None:
        slides = _import_features(folder, content.slides).sort_values(["case_id", "slide"])
        _check_one_encoder(slides)
        _write_parquet(folder / SLIDES, slides, _SLIDES_SCHEMA)


def _import_features(folder: Path, slides: pd.DataFrame) -> pd.DataFrame:
    """Write the features that lie in untrusted files into the folder, and say what they are."""
    if "source" not in slides:
        return slides
    rows: list[dict[Any, Any]] = slides.to_dict(orient="records")
    for row in rows:
        if row["source"] is not None:
            feats = import_pt(Path(row["source"]), folder / row["features"])
            facts = {"encoder": feats.encoder, "tiles": len(feats), "width": feats.width}
            row.update(facts, producer=feats.producer)
    return pd.DataFrame(rows)


def _check_one_encoder(slides: pd.DataFrame) -> None:
    """Refuse features of several widths or tile encoders in one cohort."""
    for column in ("width", "encoder"):
        first = slides[slides[column].notna()].drop_duplicates(column)
        if len(first) > 1:
            shown = [f"{v} ({s})" for v, s in zip(first[column], first["slide"], strict=True)]
            raise FeatureFileError(
                f"features of a cohort must have one {column}, got {name_few(shown)}; give the "
                "folder of one tile encoder"
            )


def _number(value: Any) -> float | None:
    """Return a number of a table, None where it is missing."""
    return None if pd.isna(value) else float(value)


def _write_parquet(path: Path, table: pd.DataFrame, schema: pa.Schema) -> None:
    """Write columns of a fixed schema, without pandas' own metadata."""
    columns = pa.Table.from_pandas(table[schema.names], schema, preserve_index=False)
    pq.write_table(columns.replace_schema_metadata(None), path)


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()
