"""What evaluation and prediction know of a run, whether ModalTune or a baseline was trained."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from modaltune.batch import CaseBatch
from modaltune.cases import Case, pack_cases
from modaltune.config import PositionConvention
from modaltune.engine.store import read_features
from modaltune.preprocessing import Preprocessing

Self = TypeVar("Self", bound="TrainedRun")


class TrainedRun(ABC):
    """A trained model and what turns the records of a case into its inputs.

    Attributes:
        model: In evaluation mode.
        preprocessing: What turns a case's records into inputs.
        info: Provenance, JSON values.
    """

    model: nn.Module
    preprocessing: Preprocessing
    info: dict[str, Any]

    @property
    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """Names of the T embeddings of a case."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """Width of an embedding."""

    @property
    @abstractmethod
    def random_backbone(self) -> bool:
        """Whether the slide encoder is random, not pretrained; every output says so."""

    @property
    @abstractmethod
    def position_convention(self) -> PositionConvention:
        """How the positions of tiles are counted."""

    @property
    @abstractmethod
    def tile_width(self) -> int:
        """Width of the tile features."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model is."""

    @abstractmethod
    def embed_batch(self, batch: CaseBatch, tasks: Sequence[int] | None) -> Tensor:
        """Return raw embeddings `[B, T, out_features]` of packed cases on the model's device."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Return JSON values of which, with the weights, the model is built again."""

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the weights file."""
        return {name: t.detach().contiguous() for name, t in self.model.state_dict().items()}

    def case(
        self,
        case_id: str,
        slides: Sequence[str | Path] = (),
        genes: Mapping[str, float] | pd.Series | None = None,
        clinical: Mapping[str, Any] | None = None,
    ) -> Case:
        """Put one case together from files and values; leave out what is missing.

        Args:
            case_id: The patient.
            slides: Feature files, of any producer that `read_features` knows.
            genes: Expression by gene symbol, on the scale of the training table.
            clinical: Fields of a clinical row, such as age, sex, site.

        Raises:
            InputError: A file or value breaks a rule; the message names it.
        """
        values: dict[str, Tensor] = {}
        if genes is not None:
            row = pd.DataFrame([dict(genes)], index=pd.Index([case_id]))
            values["genes"] = self.preprocessing.gene_values(row)[0]
        if clinical is not None:
            row = pd.DataFrame([dict(clinical)], index=pd.Index([case_id]))
            features, known = self.preprocessing.clinical_values(row)
            if bool(known[0]):
                values["clinical"] = features[0]
        read = tuple(read_features(path) for path in slides)
        for features_of_slide in read:
            if self.preprocessing.tiles is not None:
                self.preprocessing.tiles.check(features_of_slide)
        return Case(case_id, read, values)

    @torch.inference_mode()
    def embed(self, cases: Sequence[Case], tasks: Sequence[int] | None = None) -> Tensor:
        """Return raw embeddings `[B, T, out_features]` float32 on the CPU, one case at a time."""
        self.model.eval()
        outputs = []
        for case in cases:
            batch = pack_cases([case], self.position_convention, self.tile_width)
            outputs.append(self.embed_batch(batch.to(self.device), tasks).float().cpu())
        count = len(self.tasks if tasks is None else tasks)
        return torch.cat(outputs) if outputs else torch.zeros(0, count, self.out_features)

    def with_inputs(self: Self, preprocessing: Preprocessing, info: dict[str, Any]) -> Self:
        """Return a run of the same model with other preprocessing and provenance."""
        other = copy.copy(self)
        other.preprocessing, other.info = preprocessing, info
        return other
