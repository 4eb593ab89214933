"""What `modaltune cases build` is told: one field per option."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modaltune.clinical_gdc import DeathWithoutDate
from modaltune.errors import InputError
from modaltune.omics import DuplicateCases, Layout, NanPolicy
from modaltune.splits import Stratify, Unclassified

Requirement = Literal["inputs", "genes", "slides", "class", "survival"]


class CasesRequest(BaseModel):
    """Everything `build_cases` is told; the defaults are those of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clinical: tuple[Path, ...] = Field((), description="clinical tables, in order of belief")
    follow_up: tuple[Path, ...] = Field((), description="the GDC's follow_up.tsv")
    expression: tuple[Path, ...] = Field((), description="expression tables of one source")
    pathways: Path | None = None
    features: tuple[Path, ...] = Field((), description="folders of tile features")
    slides: Path | None = Field(None, description="CSV: slide, case_id, mpp")
    labels: Path | None = Field(None, description="CSV: case_id and label or primary_class")
    published_split: tuple[Path, Path, Path] | None = Field(None, description="train, val, test")
    split: Path | None = Field(None, description="splits.json, or CSV: case_id, split, fold")

    classes: Literal["file", "published"] = "file"
    death_without_date: DeathWithoutDate = "censor"
    exclude: tuple[str, ...] = ()
    require: tuple[Requirement, ...] = ("inputs",)

    layout: Layout = "auto"
    duplicate_cases: DuplicateCases = "error"
    nan_policy: NanPolicy = "error"
    drop_constant_genes: bool = False
    genes: Literal["auto", "pathways", "all"] = "auto"
    gene_aliases: str = "auto"

    encoder: str | None = None
    base_mpp: float | None = Field(None, ge=0.05, le=5, description="of slides, microns per px")
    target_mpp: float | None = Field(None, ge=0.05, le=5, description="of tiles, microns per px")
    import_pt: bool = False

    folds: int = 1
    test_share: float = 0.2
    val_share: float = 0.15
    stratify: Stratify = "class+event"
    by_site: bool = False
    unclassified: Unclassified = "split"
    seed: int = 0

    @classmethod
    def checked(cls, **options: Any) -> CasesRequest:
        """Return a request; a wrong option is an error of the user's, not of ours.

        Raises:
            InputError: An option is unknown or of a wrong kind; names it.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{name} must be valid, got {first['input']!r}: {first['msg']}; see "
                "modaltune cases build --help"
            ) from error


#: Fields of a request that name files.
SOURCES = (
    "clinical",
    "follow_up",
    "expression",
    "pathways",
    "slides",
    "labels",
    "published_split",
    "split",
)
