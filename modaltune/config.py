"""One configuration for the whole model; every field has its default, unit and meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modaltune.adapter import AdapterConfig
from modaltune.modalities import GeneConfig
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.slide_encoders.titan import TitanConfig

SlideEncoderConfig = Annotated[LongNetConfig | TitanConfig, Field(discriminator="kind")]
PositionConvention = Literal["scaled", "reference"]

GENERAL, DIAGNOSIS, SURVIVAL = "general", "diagnosis", "survival"
PUBLISHED_TASKS = (GENERAL, DIAGNOSIS, SURVIVAL)


class ModalTuneConfig(BaseModel):
    """Everything that shapes a ModalTune model; defaults: the published Prov-GigaPath one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slide_encoder: SlideEncoderConfig = LongNetConfig()
    adapter: AdapterConfig = AdapterConfig()
    genes: GeneConfig | None = Field(GeneConfig(), description="None for a model without genes")
    clinical_features: int = Field(0, ge=0, description="clinical inputs; 0 for none")
    tasks: tuple[str, ...] = Field(PUBLISHED_TASKS, description="task prompts, in order")
    token_agg: Literal["sum", "cat"] = Field("sum", description="how slots meet in the head")
    prompt_agg: Literal["avg", "cls"] = Field("avg", description="how gene tokens become a slot")
    global_pool: bool = Field(False, description="mean of the tiles instead of the slide vector")
    out_features: int = Field(256, gt=0, description="embedding width")
    position_convention: PositionConvention = Field(
        "scaled",
        description="scaled: tile positions in px at the target mpp; reference: level-0 px and "
        "slide offsets as published",
    )
    trunk_dropout: bool = Field(True, description="dropout in the frozen trunk, as published")
    task_dropout: Literal["parity", "shared"] = Field(
        "parity", description="dropout of modality encoders per task (published) or drawn once"
    )
    random_backbone: bool = Field(
        False, description="the slide encoder is random, not pretrained; every output says so"
    )

    @model_validator(mode="after")
    def _check(self) -> ModalTuneConfig:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must be distinct names, got {self.tasks}")
        if self.prompt_agg == "cls" and self.genes is None:
            raise ValueError("prompt_agg='cls' needs genes: the cls token stands before them")
        return self
