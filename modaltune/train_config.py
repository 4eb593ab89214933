"""The recipe of training: every knob of the loop, with the published defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["no", "bf16", "fp16"]


class TrainConfig(BaseModel):
    """Every knob of the training loop; the defaults are the published recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(20, gt=0, description="passes over the training cases")
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    warmup_epochs: int = Field(10, ge=0, description="epochs of linear warm-up")
    warmup_factor: float = Field(20.0, ge=1, description="warm-up starts at lr / this")
    weight_decay: float = Field(5e-4, ge=0, description="of AdamW, on every trainable tensor")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of AdamW's moments")
    eps: float = Field(1e-8, gt=0, description="of AdamW's denominator")
    temperature: float = Field(1.0, gt=0, description="of the distillation softmax")
    loss_factor: float = Field(10.0, gt=0, description="weight of the distillation loss")
    cases_per_step: int = Field(
        1, gt=0, description="cases per optimiser step, over all processes; published: 1"
    )
    accumulation: int = Field(
        1,
        gt=0,
        description="batches that a process splits its cases of a step into: the same gradient "
        "in less memory",
    )
    precision: Precision = Field(
        "no", description="no: float32; bf16; fp16 with a gradient scaler that starts at 2^15"
    )
    task_backward: Literal["sequential", "joint"] = Field(
        "sequential",
        description="sequential: backward after each pass of the trunk, so that the activations "
        "of one live at a time; joint: after all",
    )
    seed: int = Field(0, ge=0, description="of the order of cases and of dropout")
