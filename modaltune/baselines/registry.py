"""Which baselines there are, and how one is made by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import Tensor

from modaltune.baselines.abmil import ABMIL, ABMILSettings
from modaltune.baselines.baseline import Baseline
from modaltune.baselines.gene_mixer import GeneMixer, GeneMixerSettings
from modaltune.baselines.late_fusion import LateFusion, LateFusionSettings
from modaltune.baselines.linear_probe import LinearProbe, LinearProbeSettings
from modaltune.baselines.mcat import MCAT, MCATSettings
from modaltune.baselines.pathway_mlp import PathwayMLP, PathwayMLPSettings
from modaltune.errors import InputError
from modaltune.pathways import PathwayIndex
from modaltune.slide_encoders.protocol import SlideEncoder


@dataclass(frozen=True)
class BaselineKind:
    """One rival: its module, its settings, and what it reads."""

    module: type[Baseline]
    settings: type[BaseModel]
    reads_tiles: bool
    reads_genes: bool


BASELINES: dict[str, BaselineKind] = {
    "linear_probe": BaselineKind(LinearProbe, LinearProbeSettings, True, False),
    "abmil": BaselineKind(ABMIL, ABMILSettings, True, False),
    "pathway_mlp": BaselineKind(PathwayMLP, PathwayMLPSettings, False, True),
    "gene_mixer": BaselineKind(GeneMixer, GeneMixerSettings, False, True),
    "mcat": BaselineKind(MCAT, MCATSettings, True, True),
    "late_fusion": BaselineKind(LateFusion, LateFusionSettings, True, True),
}


def make_baseline(
    name: str,
    *,
    tile_width: int | None = None,
    pathways: PathwayIndex | tuple[Tensor, Tensor] | None = None,
    slide_encoder: SlideEncoder | None = None,
    settings: BaseModel | Mapping[str, Any] | None = None,
) -> Baseline:
    """Return a rival with new weights, drawn from torch's default generator.

    Args:
        name: One of `BASELINES`.
        tile_width: Width of the tile features, for those that read tiles.
        pathways: Genes of each pathway, as an index or as its `indices` `[nnz]` and `offsets`
            `[P + 1]`, for those that read genes.
        slide_encoder: Frozen encoder of the linear probe.
        settings: Its settings, or some of their fields; the paper's unless given.

    Raises:
        InputError: An unknown name, something that it reads is not given, or bad settings.
    """
    if name not in BASELINES:
        raise InputError(f"name must be one of {', '.join(BASELINES)}, got {name!r}; pick one")
    kind = BASELINES[name]
    shape: list[Any] = []
    if kind.reads_tiles:
        if tile_width is None or tile_width < 1:
            raise InputError(
                f"tile_width must be given for {name}, which reads tiles, got {tile_width}; it is "
                "the width of the tile features"
            )
        shape.append(tile_width)
    if kind.reads_genes:
        if pathways is None:
            raise InputError(
                f"pathways must be given for {name}, which reads genes, got None; build them with "
                "PathwayIndex.build"
            )
        if isinstance(pathways, PathwayIndex):
            pathways = (pathways.indices, pathways.offsets)
        shape += pathways
    if kind.module is LinearProbe:
        shape.append(slide_encoder)
    return kind.module(*shape, _settings(kind, name, settings))


def _settings(
    kind: BaselineKind, name: str, given: BaseModel | Mapping[str, Any] | None
) -> BaseModel:
    """Return checked settings of a kind."""
    if isinstance(given, kind.settings):
        return given
    if isinstance(given, BaseModel):
        raise InputError(
            f"settings of {name} must be {kind.settings.__name__}, got {type(given).__name__}; "
            "make them of that class, or pass a mapping of fields"
        )
    try:
        return kind.settings.model_validate(dict(given or {}))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()
        )
        raise InputError(
            f"settings of {name} must be fields of {kind.settings.__name__}, got {faults}; see its "
            "description"
        ) from error
