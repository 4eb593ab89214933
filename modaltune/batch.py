"""What goes into the model: the tiles of several cases, packed, and their modalities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modaltune.errors import InputError

if TYPE_CHECKING:
    from modaltune.model import ModalTune


@dataclass(frozen=True)
class CaseBatch:
    """B cases of any length, without padding.

    Attributes:
        tiles: `[N, in_features]` tile features of all cases, case after case.
        positions_px: `[N, 2]` `(x, y)` of the tiles' corners, px of the position convention.
        offsets: `[B + 1]` int64 on the CPU; case b owns rows `offsets[b]:offsets[b + 1]`, which
            may be none.
        modalities: Values by name, `[B, ...]` each; rows of cases without it may hold anything.
        present: `[B]` bool by name, which cases have the modality; all of them unless given.
        case_ids: Ids for messages; numbers unless given.
    """

    tiles: Tensor
    positions_px: Tensor
    offsets: Tensor
    modalities: Mapping[str, Tensor] = field(default_factory=dict)
    present: Mapping[str, Tensor] = field(default_factory=dict)
    case_ids: tuple[str, ...] = ()

    @property
    def num_cases(self) -> int:
        """Number of cases B."""
        return self.offsets.numel() - 1

    def case_id(self, index: int) -> str:
        """Return the id of one case, for messages."""
        return self.case_ids[index] if self.case_ids else str(index)

    def modality(self, name: str) -> tuple[Tensor | None, Tensor]:
        """Return the values `[B, ...]` of a modality (None if no case has it) and who has it.

        Values of cases without the modality come back as zeros: whatever stood there (NaN too)
        can't leak into a sum.
        """
        values = self.modalities.get(name)
        if values is None:
            return None, torch.zeros(self.num_cases, dtype=torch.bool)
        present = self.present.get(name)
        if present is None:
            return values, torch.ones(self.num_cases, dtype=torch.bool)
        shape = (-1, *[1] * (values.dim() - 1))
        kept = torch.where(present.to(values.device).reshape(shape), values, values.new_zeros(()))
        return kept, present

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> CaseBatch:
        """Return the batch with tensors on `device` and floats as `dtype`; offsets stay put."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() else None)

        return replace(
            self,
            tiles=move(self.tiles),
            positions_px=self.positions_px.to(device),
            modalities={name: move(t) for name, t in self.modalities.items()},
        )

    def check(self, model: ModalTune) -> None:
        """Raise InputError where this batch does not fit the model.

        Raises:
            InputError: Wrong widths, non-finite values, unknown modalities, broken offsets, a case
                that holds nothing; the message names the case.
        """
        self._check_tiles(model.slide_encoder.in_features)
        unknown = set(self.modalities) - set(model.modalities)
        if unknown:
            raise InputError(
                f"modalities must be among {sorted(model.modalities)}, got {sorted(unknown)}; "
                "pass further ones to ModalTune(extra_modalities=...)"
            )
        has_any = self.offsets.diff() > 0
        for name, module in model.each_modality().items():
            if name in self.modalities:
                has_any = has_any | self._check_modality(name, module.in_features).cpu()
        if not bool(has_any.all()):
            raise InputError(
                f"case {self.case_id(int((~has_any).nonzero()[0]))} must have tiles or a modality "
                "of the model, got none; leave it out"
            )

    def check_values(self, tile_width: int | None, widths: Mapping[str, int | None]) -> None:
        """Raise InputError where tiles or the modalities named are not what a reader expects.

        Args:
            tile_width: Feature width of the tiles; None for a reader that looks at none.
            widths: Modalities that are read and their widths, None for any. A batch may lack any
                of them, and others are not looked at.
        """
        if tile_width is not None:
            self._check_tiles(tile_width)
        for name in widths.keys() & self.modalities.keys():
            self._check_modality(name, widths[name])

    def _check_tiles(self, width: int) -> None:
        if self.tiles.dim() != 2 or (self.tiles.shape[0] and self.tiles.shape[1] != width):
            raise InputError(
                f"tile features must be [N, {width}] for this slide encoder, got "
                f"{list(self.tiles.shape)}; embed the slides with the tile encoder it was made for"
            )
        if tuple(self.positions_px.shape) != (self.tiles.shape[0], 2):
            raise InputError(
                f"positions_px must be [{self.tiles.shape[0]}, 2], a corner (x, y) per tile, got "
                f"{list(self.positions_px.shape)}; pass the coordinates of the same tiles"
            )
        bounds = self.offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != self.tiles.shape[0] or bounds != sorted(bounds):
            raise InputError(
                f"offsets must rise from 0 to {self.tiles.shape[0]} rows of tiles, got {bounds[:8]}"
            )
        if self.case_ids and len(self.case_ids) != self.num_cases:
            raise InputError(
                f"case_ids must name {self.num_cases} cases, got {len(self.case_ids)}; give one "
                "for each, or none"
            )
        bad = ~torch.isfinite(self.tiles).all(dim=1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            case = sum(end <= row for end in bounds[1:])
            raise InputError(
                f"tile features must be finite, got NaN or infinity in {int(bad.sum())} tile(s), "
                f"the first of case {self.case_id(case)}; embed its slides again"
            )

    def _check_modality(self, name: str, width: int | None) -> Tensor:
        """Check the values of one modality; return `[B]` bool, who has it."""
        for what, tensor in ((name, self.modalities[name]), ("present", self.present.get(name))):
            if tensor is not None and tensor.shape[:1] != (self.num_cases,):
                raise InputError(
                    f"{what} of modality {name} must have {self.num_cases} rows, one a case, got "
                    f"{list(tensor.shape)}"
                )
        kept, present = self.modality(name)
        values = self.modalities[name] if kept is None else kept
        if width is not None and values.shape[1:] != (width,):
            raise InputError(
                f"{name} must be [{self.num_cases}, {width}] for this model, got "
                f"{list(values.shape)}; preprocess them with what was saved with the model"
            )
        bad = ~torch.isfinite(values).reshape(self.num_cases, -1).all(dim=1)
        if bool(bad.any()):
            first = self.case_id(int(bad.nonzero()[0]))
            raise InputError(
                f"{name} must be finite, got NaN or infinity in {int(bad.sum())} case(s), the "
                f"first is {first}; impute the values or leave the modality of that case out"
            )
        return present
