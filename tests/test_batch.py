"""Packed batches: what is refused, by message; gaps become zeros. Equality: tests/test_model.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from modaltune.adapter import AdapterConfig
from modaltune.batch import CaseBatch
from modaltune.config import ModalTuneConfig
from modaltune.errors import InputError
from modaltune.modalities import GeneConfig
from modaltune.model import ModalTune
from modaltune.slide_encoders.longnet import LongNetConfig

CONFIG = ModalTuneConfig(
    slide_encoder=LongNetConfig(in_features=3, width=8, depth=1, heads=2, ffn_width=8),
    adapter=AdapterConfig(heads=2, interactions=((0, 0),)),
    genes=GeneConfig(width=4, depth=1, tokens=2),
    clinical_features=2,
    out_features=5,
)


@pytest.fixture(scope="module")
def model() -> ModalTune:
    return ModalTune(
        CONFIG, gene_index=torch.arange(4), gene_offsets=torch.tensor([0, 2, 4])
    ).eval()


def batch(**changes: Any) -> CaseBatch:
    whole = CaseBatch(
        torch.ones(5, 3),
        torch.zeros(5, 2),
        torch.tensor([0, 2, 2, 5]),
        {"genes": torch.ones(3, 4), "clinical": torch.ones(3, 2)},
        {},
        ("A", "B", "C"),
    )
    return replace(whole, **changes)


def with_nan(rows: int, width: int, row: int) -> torch.Tensor:
    values = torch.ones(rows, width)
    values[row, width - 1] = torch.nan
    return values


def test_a_good_batch_passes(model: ModalTune) -> None:
    batch().check(model)
    assert batch().num_cases == 3
    assert [batch().case_id(b) for b in range(3)] == ["A", "B", "C"]
    assert batch(case_ids=()).case_id(2) == "2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tiles": torch.ones(5, 4)},
            r"tile features must be \[N, 3\].*got \[5, 4\].*encoder",
        ),
        ({"tiles": torch.ones(5)}, r"tile features must be \[N, 3\]"),
        ({"positions_px": torch.zeros(4, 2)}, r"positions_px must be \[5, 2\].*got \[4, 2\]"),
        ({"positions_px": torch.zeros(5, 3)}, r"positions_px must be \[5, 2\]"),
        ({"offsets": torch.tensor([0, 2, 4, 4])}, "offsets must rise from 0 to 5"),
        ({"offsets": torch.tensor([1, 2, 2, 5])}, "offsets must rise from 0 to 5"),
        ({"offsets": torch.tensor([0, 3, 2, 5])}, "offsets must rise from 0 to 5"),
        ({"case_ids": ("A", "B")}, "case_ids must name 3 cases, got 2"),
        ({"tiles": with_nan(5, 3, 3)}, r"tile features must be finite.*1 tile.*first of case C"),
        ({"tiles": with_nan(5, 3, 2)}, r"tile features must be finite.*first of case C"),
        ({"tiles": with_nan(5, 3, 1)}, r"tile features must be finite.*first of case A"),
        ({"modalities": {"rna": torch.ones(3, 4)}}, r"modalities must be among .*genes.*'rna'"),
        ({"modalities": {"genes": torch.ones(2, 4)}}, "genes must have 3 rows|modality genes must"),
        ({"modalities": {"genes": torch.ones(3, 9)}}, r"genes must be \[3, 4\].*got \[3, 9\]"),
        ({"modalities": {"clinical": torch.ones(3, 1)}}, r"clinical must be \[3, 2\]"),
        ({"modalities": {"genes": with_nan(3, 4, 1)}}, r"genes must be finite.*1 case.*first is B"),
        ({"present": {"genes": torch.tensor([True])}}, "present of modality genes must have 3"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: ModalTune, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model(batch(**changes))


def test_a_case_with_nothing_is_named(model: ModalTune) -> None:
    empty = batch(present={n: torch.tensor([True, False, True]) for n in ("genes", "clinical")})
    with pytest.raises(InputError, match="case B must have tiles or a modality of the model"):
        model(empty)
    bare = batch(modalities={})
    with pytest.raises(InputError, match="case B must have tiles"):
        model(bare)


def test_nan_of_an_absent_row_becomes_zero() -> None:
    gaps = batch(
        modalities={"genes": with_nan(3, 4, 1)},
        present={"genes": torch.tensor([True, False, True])},
    )
    values, present = gaps.modality("genes")
    assert values is not None
    assert values[1].tolist() == [0, 0, 0, 0]
    assert torch.equal(values[[0, 2]], torch.ones(2, 4))
    assert present.tolist() == [True, False, True]


def test_a_modality_nobody_has_is_absent_everywhere() -> None:
    values, present = batch(modalities={}).modality("genes")
    assert values is None
    assert present.tolist() == [False] * 3
    values, present = batch().modality("genes")
    assert present.tolist() == [True] * 3


def test_floats_change_type_and_positions_do_not() -> None:
    moved = batch(positions_px=torch.zeros(5, 2, dtype=torch.float64)).to("cpu", torch.float16)
    assert moved.tiles.dtype == moved.modalities["genes"].dtype == torch.float16
    # float16 ends at 65,504 px: positions keep their type.
    assert moved.positions_px.dtype == torch.float64
    assert moved.offsets.dtype == torch.int64
