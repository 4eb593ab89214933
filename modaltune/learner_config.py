"""What is trained: ModalTune, or a baseline with its heads; a section of the run configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modaltune.baselines.abmil import ABMILSettings
from modaltune.baselines.gene_mixer import GeneMixerSettings
from modaltune.baselines.late_fusion import LateFusionSettings
from modaltune.baselines.linear_probe import LinearProbeSettings
from modaltune.baselines.mcat import MCATSettings
from modaltune.baselines.pathway_mlp import PathwayMLPSettings

_KIND = (
    "modaltune, or a baseline: linear_probe, abmil (slides), pathway_mlp, gene_mixer (genes), "
    "mcat, late_fusion (both)"
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModalTuneSection(_Section):
    """What is trained."""

    kind: Literal["modaltune"] = Field("modaltune", description=_KIND)


class BaselineSection(_Section):
    """What is trained: a baseline and its heads."""

    classes: bool = Field(True, description="a class head, where training cases have two classes")
    survival: Literal["hazard", "cox", "none"] = Field(
        "hazard",
        description="survival head: hazard of each bin of time (discrete); cox, which needs steps "
        "of several cases; none",
    )
    bins: int = Field(4, ge=2, description="bins of survival time, of as many deaths each")
    balanced: bool = Field(False, description="weigh classes by the inverse of their frequency")
    survival_weight: float = Field(1.0, gt=0, description="of the survival loss beside the class's")

    @model_validator(mode="after")
    def _check(self) -> BaselineSection:
        if not self.classes and self.survival == "none":
            raise ValueError("learner must have a head: classes = true, or survival hazard or cox")
        return self


class LinearProbeSection(BaselineSection):
    """What is trained: linear heads on a frozen slide encoder."""

    kind: Literal["linear_probe"] = Field("linear_probe", description=_KIND)
    settings: LinearProbeSettings = LinearProbeSettings()


class ABMILSection(BaselineSection):
    """What is trained: attention-based pooling of tiles."""

    kind: Literal["abmil"] = Field("abmil", description=_KIND)
    settings: ABMILSettings = ABMILSettings()


class PathwayMLPSection(BaselineSection):
    """What is trained: a self-normalising network per pathway."""

    kind: Literal["pathway_mlp"] = Field("pathway_mlp", description=_KIND)
    settings: PathwayMLPSettings = PathwayMLPSettings()


class GeneMixerSection(BaselineSection):
    """What is trained: the gene encoder of ModalTune alone."""

    kind: Literal["gene_mixer"] = Field("gene_mixer", description=_KIND)
    settings: GeneMixerSettings = GeneMixerSettings()


class MCATSection(BaselineSection):
    """What is trained: co-attention of pathways over tiles."""

    kind: Literal["mcat"] = Field("mcat", description=_KIND)
    settings: MCATSettings = MCATSettings()


class LateFusionSection(BaselineSection):
    """What is trained: ABMIL beside the pathway MLP."""

    kind: Literal["late_fusion"] = Field("late_fusion", description=_KIND)
    settings: LateFusionSettings = LateFusionSettings()


AnyBaseline = (
    LinearProbeSection
    | ABMILSection
    | PathwayMLPSection
    | GeneMixerSection
    | MCATSection
    | LateFusionSection
)
LearnerSection = Annotated[ModalTuneSection | AnyBaseline, Field(discriminator="kind")]
