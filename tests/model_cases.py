"""Published options, cases and batches that the tests of the whole model share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modaltune.batch import CaseBatch
from modaltune.model import ModalTune
from modaltune.reference_config import config_from_reference
from modaltune.reference_import import model_from_reference


def _load_oracle() -> Any:
    # Under importlib mode test files can't import each other by name.
    path = Path(__file__).with_name("oracle_model.py")
    spec = importlib.util.spec_from_file_location("oracle_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ref = _load_oracle()
Options = dict[str, Any]
GRID: dict[str, dict[str, Any]] = {
    "published": {},
    "cat cls clinical": {"token_agg": "cat", "prompt_agg": "cls", "clinical": True},
    "sum cls clinical": {"prompt_agg": "cls", "clinical": True},
    "cat single task": {"token_agg": "cat", "multi_task": 1},
    "cat single task clinical": {"token_agg": "cat", "multi_task": 1, "clinical": True},
    "full width": {"with_cffn": False},
    "full width cat": {"with_cffn": False, "token_agg": "cat", "use_prompt_sa": False},
    "no self-attention": {"use_prompt_sa": False},
    "no extra extractors": {"use_extra_extractor": False},
    "global pool": {"global_pool": True},
    "late start, gap": {"interaction_indexes": [[1, 1], [3, 3]]},
    "three ranges": {"interaction_indexes": [[1, 1], [2, 2], [4, 4]], "clinical": True},
    "one range": {"interaction_indexes": [[0, 4]], "multi_task": 2},
}


def options(**changes: Any) -> Options:
    return {**ref.BASE, **changes}


def build(o: Options, state: dict[str, Tensor]) -> ModalTune:
    offsets = torch.tensor([0, *ref.SIZES]).cumsum(0)
    index = torch.arange(sum(ref.SIZES))
    model = ModalTune(config_from_reference(o), gene_index=index, gene_offsets=offsets)
    model.double().eval()
    model_from_reference(model, state)
    model.adjust(task_trunk=o.get("task_trunk", "separate"))
    return model


def one_case(o: Options, seed: int = 1, tiles: int = 21) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    case = {
        "tiles": draw(tiles, o["in_chans"]),
        "coords": torch.randint(0, 256 * (o["slide_ngrids"] - 1), (tiles, 2), generator=g).double(),
        "genes": draw(sum(ref.SIZES)),
    }
    case["coords"][0] = torch.tensor([300.0, 256.0 * (o["slide_ngrids"] + 2)])  # wraps
    return case | ({"clinical": draw(o["clinfeat_dim"])} if o["clinical"] else {})


def without(case: dict[str, Tensor], names: str) -> dict[str, Tensor]:
    return {name: t for name, t in case.items() if name not in names.split()}


def batch_of(o: Options, cases: list[dict[str, Tensor]]) -> CaseBatch:
    """Pack cases; rows of a missing modality hold NaN, which must not get anywhere."""
    tiles = [c["tiles"] if "tiles" in c else torch.zeros(0, o["in_chans"]).double() for c in cases]
    coords = [c["coords"] for c in cases if "tiles" in c] or [torch.zeros(0, 2)]
    values, present = {}, {}
    for name, width in (("genes", sum(ref.SIZES)), ("clinical", o["clinfeat_dim"])):
        if any(name in c for c in cases):
            gap = torch.full((width,), torch.nan, dtype=torch.float64)
            values[name] = torch.stack([c.get(name, gap) for c in cases])
            present[name] = torch.tensor([name in c for c in cases])
    offsets = torch.tensor([0, *(len(t) for t in tiles)]).cumsum(0)
    return CaseBatch(torch.cat(tiles), torch.cat(coords), offsets, values, present)


def expected(state: dict[str, Tensor], o: Options, case: dict[str, Tensor]) -> Tensor:
    return torch.stack([ref.oracle(state, o, case, k) for k in range(o["multi_task"])])


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm()) <= tolerance * float(want.norm())
