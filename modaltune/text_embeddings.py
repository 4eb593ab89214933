"""Label embeddings of a cohort, computed before and stored: what tuning reads."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modaltune.engine.atomic import atomic_path
from modaltune.engine.untrusted_pt import UntrustedPtError, load_pt_tensors
from modaltune.errors import CohortError
from modaltune.labels import ROWS
from modaltune.tables import name_few

_STORED_SUFFIXES = frozenset({".safetensors", ".npz", ".pt"})


@dataclass(frozen=True, eq=False)
class PrecomputedText:
    """Label embeddings of a cohort, computed before: what tuning reads.

    Attributes:
        embeddings: Case id to `[4, d]` float32, rows in the order of `labels.ROWS`.
        provenance: Text to text, e.g. encoder name, its hash and its pooling.

    Raises:
        CohortError: An embedding has another shape than the first, or holds NaN; names the case.
    """

    embeddings: dict[str, Tensor]
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.embeddings:
            raise CohortError("embeddings must hold at least one case, got none; check the file")
        shapes = {tuple(rows.shape) for rows in self.embeddings.values()}
        expected = (len(ROWS), min(shapes)[-1] if min(shapes) else 0)
        for case, rows in self.embeddings.items():
            if tuple(rows.shape) != expected or not bool(torch.isfinite(rows).all()):
                raise CohortError(
                    f"embedding of case {case} must be {len(ROWS)} finite rows ({', '.join(ROWS)}) "
                    f"of one width, got shape {tuple(rows.shape)}, finite: "
                    f"{bool(torch.isfinite(rows).all())}; embed the labels again"
                )

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return next(iter(self.embeddings.values())).shape[1]

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Any], provenance: Mapping[str, str] | None = None
    ) -> PrecomputedText:
        """Build from any mapping of case id to `(4, d)` numbers (arrays or tensors).

        Raises:
            CohortError: The values are no numbers, or see the class.
        """
        try:
            rows = {
                str(case): torch.tensor(np.asarray(values), dtype=torch.float32)
                for case, values in arrays.items()
            }
        except (TypeError, ValueError) as error:
            raise CohortError(
                f"embeddings must be numbers, got others ({error}); embed the labels again"
            ) from error
        return cls(rows, dict(provenance or {}))

    def lookup(self, case_ids: Sequence[str]) -> Tensor:
        """Return the embeddings of cases, `[B, 4, d]` float32, joined by id.

        Raises:
            CohortError: A case has no embedding; names the cases.
        """
        absent = [case for case in case_ids if case not in self.embeddings]
        if absent:
            raise CohortError(
                f"every case must have a label embedding, got none for {name_few(absent)}; "
                "embed their labels, or leave the cases out"
            )
        if not case_ids:
            return torch.zeros(0, len(ROWS), self.width)
        return torch.stack([self.embeddings[case] for case in case_ids])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: a `[4, d]` tensor per case id, provenance in the header."""
        with atomic_path(path) as temp:
            rows = {case: tensor.contiguous() for case, tensor in self.embeddings.items()}
            save_file(rows, temp, metadata=self.provenance)

    @classmethod
    def load(cls, path: str | Path) -> PrecomputedText:
        """Read label embeddings: case id to `(4, d)`.

        Args:
            path: `.safetensors` (ours), `.npz` (no pickled objects), or the published `.pt`, which
                is read in a child process without unpickling objects.

        Raises:
            CohortError: The file is absent, damaged, of another kind or shape.
        """
        path = Path(path)
        if path.suffix not in _STORED_SUFFIXES or not path.is_file():
            raise CohortError(
                f"{path} must be an existing .safetensors, .npz or .pt file of label embeddings, "
                f"got {'another kind' if path.is_file() else 'no such file'}; check the path"
            )
        return cls.from_arrays(*_read_arrays(path))


def _read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read arrays by name, and the header's provenance, without unpickling anything."""
    damage = (SafetensorError, UntrustedPtError, zipfile.BadZipFile, OSError, ValueError, EOFError)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}, {}
        return load_pt_tensors(path), {}
    except damage as error:
        raise CohortError(
            f"{path} must be a readable file of label embeddings, got "
            f"{type(error).__name__}: {str(error)[:200]}; check that it was written whole"
        ) from error
