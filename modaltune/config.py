"""One configuration for the whole model; every field has its default, unit and meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modaltune.adapter import AdapterConfig
from modaltune.errors import InputError
from modaltune.modalities import GeneConfig
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.slide_encoders.titan import TitanConfig

SlideEncoderConfig = Annotated[LongNetConfig | TitanConfig, Field(discriminator="kind")]
PositionConvention = Literal["scaled", "reference"]

GENERAL, DIAGNOSIS, SURVIVAL = "general", "diagnosis", "survival"
PUBLISHED_TASKS = (GENERAL, DIAGNOSIS, SURVIVAL)

# Fields that leave the weights as they are, so a model that exists may change them.
SETTINGS = ("task_trunk", "task_packing", "task_dropout", "trunk_dropout", "recompute")


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
        "parity",
        description="dropout of tiles and modality encoders drawn per task (published) or once; "
        "a shared trunk draws everything once",
    )
    task_trunk: Literal["separate", "shared"] = Field(
        "separate",
        description="separate: one pass of the trunk per task prompt (published); shared: one for "
        "all, in which no other token attends to a task token",
    )
    task_packing: Literal["auto", "always", "never"] = Field(
        "auto",
        description="separate passes without gradients run as one, packed: where it saves time",
    )
    recompute: Literal["none", "layer", "interaction"] = Field(
        "none",
        description="what a training step computes again instead of keeping it: nothing; the "
        "inside of every encoder block, injector and extractor; whole interactions, too",
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

    def adjusted(self, **settings: Any) -> ModalTuneConfig:
        """Return the configuration with other settings (`SETTINGS`), the weights' shapes untouched.

        Raises:
            InputError: A field shapes the weights, does not exist, or can't have the value.
        """
        fixed = sorted(set(settings) - set(SETTINGS))
        if fixed:
            raise InputError(
                f"settings must be among {', '.join(SETTINGS)}, got {', '.join(fixed)}; what "
                "shapes the weights is fixed when a model is built"
            )
        try:
            return ModalTuneConfig.model_validate({**dict(self), **settings})
        except ValidationError as error:
            faults = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
            raise InputError(
                f"settings must have values of the configuration, got {settings}: {faults}"
            ) from error
