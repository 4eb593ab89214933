"""Embeddings of a whole cohort: one Parquet table, a row per case and task prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from modaltune.cases import Case, Cohort, prepare_cases
from modaltune.engine.atomic import atomic_path
from modaltune.errors import CohortError
from modaltune.tables import name_few, naming_damage
from modaltune.trained_run import TrainedRun

CASES_IN_MEMORY = 16  # whose tile features are held at once
ALIKE = 0.98  # cosine above which two different cases count as the same embedding


@dataclass(frozen=True)
class CohortEmbeddings:
    """Embeddings `[N, T, out_features]` of N cases, and how much they differ.

    Attributes:
        cases: The cases, in order, without their tile features.
        values: `[N, T, out_features]` float32, not normalised.
        alike_share: Share of pairs of cases whose general embeddings have cosine > 0.98, or None
            for a single case. Near 1 the embedding does not tell patients apart.
    """

    cases: tuple[Case, ...]
    values: Tensor
    alike_share: float | None


def embed_cohort(
    run: TrainedRun,
    cohort: Cohort,
    case_ids: Sequence[str] | None = None,
    on_case: Callable[[int, int], None] | None = None,
) -> CohortEmbeddings:
    """Embed every case of a cohort; a missing modality is left out of that case only.

    Args:
        run: The trained model.
        cohort: Feature files and tables.
        case_ids: Which cases; those with at least one usable modality unless given.
        on_case: Called with cases done and cases in all.

    Raises:
        InputError: A case asked for is unknown, holds nothing, or breaks a rule; named.
    """
    wanted = cohort.case_ids if case_ids is None else tuple(case_ids)
    embedded, outputs = [], []
    for first in range(0, len(wanted), CASES_IN_MEMORY):
        chunk = wanted[first : first + CASES_IN_MEMORY]
        for done, case in enumerate(prepare_cases(cohort, chunk, run.preprocessing), first + 1):
            if case_ids is not None or case.values or any(len(s) for s in case.slides):
                outputs.append(run.embed([case]))
                embedded.append(_without_features(case))
            if on_case is not None:
                on_case(done, len(wanted))
    values = torch.cat(outputs) if outputs else run.embed([])
    return CohortEmbeddings(tuple(embedded), values, alike_share(values[:, 0]))


def _without_features(case: Case) -> Case:
    """Return a case whose slides keep their tile count, but not the features: they may be GBs."""
    slides = (replace(s, features=s.features[:, :0].copy()) for s in case.slides)
    return replace(case, slides=tuple(slides))


def case_modalities(case: Case) -> list[str]:
    """Return what a case's embedding is made of: "slide" if it has tiles, then other inputs."""
    return (["slide"] if any(len(s) for s in case.slides) else []) + sorted(case.values)


def alike_share(embeddings: Tensor) -> float | None:
    """Return the share of pairs of rows `[N, D]` with cosine > 0.98; None for fewer than two."""
    count = embeddings.shape[0]
    if count < 2:
        return None
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    above = sum(int((block @ unit.T > ALIKE).sum()) for block in unit.split(1024)) - count
    return max(above, 0) / (count * (count - 1))


def write_embeddings(path: str | Path, run: TrainedRun, embeddings: CohortEmbeddings) -> Path:
    """Write `embeddings.parquet`: ids, task, modalities used, slides, tiles, embedding.

    The file's metadata (`modaltune`) says which model made it, and whether its slide encoder is
    random.
    """
    path = Path(path)
    tasks, width = run.tasks, run.out_features
    rows: dict[str, list[Any]] = {
        name: [] for name in ("case_id", "task", "modalities", "slides", "tiles")
    }
    for case in embeddings.cases:
        tiles, used = sum(len(slide) for slide in case.slides), case_modalities(case)
        for task in tasks:
            rows["case_id"].append(case.case_id)
            rows["task"].append(task)
            rows["modalities"].append(used)
            rows["slides"].append([slide.slide for slide in case.slides])
            rows["tiles"].append(tiles)
    flat = pa.array(embeddings.values.reshape(-1).numpy())
    provenance = {
        **run.info,
        "random_backbone": run.random_backbone,
        "position_convention": run.position_convention,
        "alike_share": embeddings.alike_share,
    }
    table = pa.table(
        {
            "case_id": pa.array(rows["case_id"], pa.string()),
            "task": pa.array(rows["task"], pa.string()),
            "modalities": pa.array(rows["modalities"], pa.list_(pa.string())),
            "slides": pa.array(rows["slides"], pa.list_(pa.string())),
            "tiles": pa.array(rows["tiles"], pa.int64()),
            "random_backbone": pa.array([run.random_backbone] * len(rows["task"]), pa.bool_()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
        }
    ).replace_schema_metadata({"modaltune": json.dumps(provenance)})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
    return path


@dataclass(frozen=True)
class EmbeddingsTable:
    """What `write_embeddings` wrote.

    Attributes:
        case_ids: N cases, in the order of the file.
        tasks: T task prompts.
        values: `[N, T, out_features]` float32.
        modalities: What each case's embedding was made of.
        provenance: The file's metadata.
    """

    case_ids: tuple[str, ...]
    tasks: tuple[str, ...]
    values: npt.NDArray[np.float32]
    modalities: tuple[tuple[str, ...], ...]
    provenance: dict[str, Any]


def read_embeddings(path: str | Path) -> EmbeddingsTable:
    """Read `embeddings.parquet`.

    Raises:
        CohortError: The file is damaged, or no whole table of embeddings.
    """
    path = Path(path)
    with naming_damage(path, "a table of embeddings (Parquet)"):
        table = pq.read_table(path)
        provenance = json.loads((table.schema.metadata or {}).get(b"modaltune", b"{}"))
    needed = {"case_id", "task", "modalities", "embedding"}
    if not needed <= set(table.column_names):
        raise CohortError(
            f"{path} must have the columns {', '.join(sorted(needed))}, got "
            f"{name_few(table.column_names)}; write it with modaltune embed or evaluate"
        )
    rows, prompts = table["case_id"].to_pylist(), table["task"].to_pylist()
    tasks = tuple(dict.fromkeys(prompts))
    ids = tuple(dict.fromkeys(rows))
    if [(c, t) for c in ids for t in tasks] != list(zip(rows, prompts, strict=True)):
        raise CohortError(
            f"{path} must hold every task prompt of every case, in one order, got "
            f"{len(rows)} rows of {len(ids)} cases and {len(tasks)} prompts; embed them again"
        )
    flat = table["embedding"].combine_chunks()
    values = flat.values.to_numpy(zero_copy_only=False).astype(np.float32)
    width = flat.type.list_size
    used = tuple(tuple(m) for m in table["modalities"].to_pylist()[:: len(tasks) or 1])
    return EmbeddingsTable(
        ids, tasks, values.reshape(len(ids), len(tasks), width), used, provenance
    )
