"""Stored label embeddings: round trips, foreign files, joins by id, refused shapes."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from modaltune.errors import CohortError
from modaltune.text_embeddings import PrecomputedText

ARRAYS = {
    case: np.random.default_rng(seed).normal(size=(4, 6)).astype(np.float32)
    for seed, case in enumerate(["TCGA-AA-0001", "TCGA-BB-0002", "TCGA-CC-0003"])
}


def test_save_and_load_keep_values_and_provenance(tmp_path: Path) -> None:
    path = tmp_path / "new_folder" / "text.safetensors"
    block = torch.from_numpy(np.stack(list(ARRAYS.values())))
    # Views with gaps between their numbers, which safetensors refuses to write as they are.
    views = block.movedim(0, -1).contiguous().unbind(-1)
    stored = PrecomputedText(dict(zip(ARRAYS, views, strict=True)), {"encoder": "minilm"})
    stored.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["text.safetensors"]
    with safe_open(path, framework="np") as file:
        for case, rows in ARRAYS.items():
            np.testing.assert_array_equal(file.get_tensor(case), rows)
    back = PrecomputedText.load(path)
    assert back.provenance == {"encoder": "minilm"}
    assert back.width == 6
    torch.testing.assert_close(back.lookup(list(ARRAYS)), block, rtol=0, atol=0)


def test_npz_and_published_pt_files_are_read(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "text.npz", **{case: rows.astype(np.float64) for case, rows in ARRAYS.items()}
    )
    torch.save({c: torch.from_numpy(rows) for c, rows in ARRAYS.items()}, tmp_path / "text.pt")
    for name in ("text.npz", "text.pt"):
        loaded = PrecomputedText.load(tmp_path / name)
        assert set(loaded.embeddings) == set(ARRAYS)
        rows = loaded.lookup(["TCGA-BB-0002"])[0]
        assert rows.dtype == torch.float32
        np.testing.assert_allclose(rows, ARRAYS["TCGA-BB-0002"])


def test_lookup_joins_by_id() -> None:
    stored = PrecomputedText.from_arrays(ARRAYS)
    order = ["TCGA-CC-0003", "TCGA-AA-0001", "TCGA-CC-0003"]
    np.testing.assert_array_equal(stored.lookup(order), np.stack([ARRAYS[c] for c in order]))
    assert stored.lookup([]).shape == (0, 4, 6)
    with pytest.raises(CohortError, match="got none for nobody"):
        stored.lookup(["TCGA-AA-0001", "nobody"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"b": np.zeros((3, 6))}, r"case b must be 4 finite rows .* got shape \(3, 6\)"),
        ({"b": np.full((4, 6), np.nan)}, r"case b must be .*finite: False"),
        ({"b": np.zeros((4, 7))}, r"case b must be 4 finite rows .* of one width"),
        ({"b": np.array(["x"])}, "must be numbers"),
        ({"b": np.float32(1.0)}, r"case .* must be 4 finite rows"),
    ],
)
def test_wrong_shapes_and_values_are_refused(bad: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(CohortError, match=message):
        PrecomputedText.from_arrays({"a": np.zeros((4, 6)), **bad})
    with pytest.raises(CohortError, match="at least one case"):
        PrecomputedText.from_arrays({})


class Planted:
    """Runs when a careless reader unpickles it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path(self.target),))  # type: ignore[attr-defined]


def test_no_file_is_unpickled(tmp_path: Path) -> None:
    planted = Planted()
    planted.target = str(tmp_path / "ran")  # type: ignore[attr-defined]
    pickle.loads(pickle.dumps(planted))
    assert (tmp_path / "ran").exists()  # it bites
    (tmp_path / "ran").unlink()
    torch.save({"a": planted}, tmp_path / "evil.pt")
    np.savez(tmp_path / "evil.npz", a=np.array([planted], dtype=object))
    for name in ("evil.pt", "evil.npz"):
        with pytest.raises(CohortError, match="must be a readable file of label embeddings"):
            PrecomputedText.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.npz"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(CohortError, match=name):
            PrecomputedText.load(tmp_path / name)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(CohortError, match="got another kind"):
        PrecomputedText.load(tmp_path / "a.csv")
    with pytest.raises(CohortError, match="got no such file"):
        PrecomputedText.load(tmp_path / "absent.npz")
