"""Predictions on disk, beside their embeddings: Parquet, CSV or h5ad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from modaltune.cohort_embeddings import CohortEmbeddings, case_modalities
from modaltune.engine.atomic import atomic_path
from modaltune.errors import InputError
from modaltune.fitted_probes import FittedProbes
from modaltune.trained_run import TrainedRun


def write_predictions(
    path: Path,
    table: pd.DataFrame,
    run: TrainedRun,
    embedded: CohortEmbeddings,
    fitted: FittedProbes | None,
) -> Path:
    """Write predictions with their embeddings as Parquet, CSV or h5ad, by the file's suffix.

    Parquet and CSV have a row per case and task prompt. h5ad has a row per case: X is the embedding
    of the first prompt, `obsm` those of all, `obs` the predictions as `<task>_<column>`.

    Args:
        path: `.parquet`, `.csv` or `.h5ad`.
        table: Of `predict_table` or `direct_table`, of the cases embedded.
        run: What predicted.
        embedded: The cases.
        fitted: The probes that predicted; None for a baseline's own heads.
    """
    used = {c.case_id: "+".join(case_modalities(c)) for c in embedded.cases}
    tiles = {c.case_id: sum(len(s) for s in c.slides) for c in embedded.cases}
    full = table.copy()
    full.insert(2, "modalities", full["case_id"].map(used))
    full.insert(3, "tiles", full["case_id"].map(tiles).astype("int64"))
    full.insert(4, "random_backbone", run.random_backbone)
    provenance = {
        **run.info,
        "random_backbone": run.random_backbone,
        "probes": None if fitted is None else dict(fitted.info),
    }
    with atomic_path(path) as temporary:
        if path.suffix == ".h5ad":
            _write_h5ad(temporary, full, embedded, provenance)
        elif path.suffix == ".csv":
            flat = embedded.values.reshape(len(full), -1).numpy()
            names = [f"embedding_{k}" for k in range(flat.shape[1])]
            wide = pd.concat([full, pd.DataFrame(flat, columns=names)], axis=1)
            wide.to_csv(temporary, index=False)
        else:
            width = embedded.values.shape[-1]
            flat = pa.array(embedded.values.reshape(-1).numpy())
            rows = pa.Table.from_pandas(full, preserve_index=False)
            rows = rows.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, width))
            text = json.dumps(provenance)
            pq.write_table(rows.replace_schema_metadata({"modaltune": text}), temporary)
    return path


def _write_h5ad(
    path: Path, full: pd.DataFrame, embedded: CohortEmbeddings, provenance: dict[str, Any]
) -> None:
    try:
        import anndata
    except ImportError as error:
        raise InputError(
            "h5ad must be written by anndata, got an installation without it; pip install "
            "'modaltune[anndata]', or write Parquet"
        ) from error
    about = ["modalities", "tiles", "random_backbone"]
    per_case = full.drop_duplicates("case_id").set_index("case_id")[about].copy()
    tasks = list(dict.fromkeys(full["task"]))
    for task in tasks:
        own = full[full["task"] == task].set_index("case_id").drop(columns=["task", *about])
        per_case = per_case.join(own.add_prefix(f"{task}_"))
    values = embedded.values.numpy()
    data = anndata.AnnData(X=values[:, 0], obs=per_case)
    for column, task in enumerate(tasks):
        data.obsm[f"X_{task}"] = values[:, column]
    data.uns["modaltune"] = json.dumps(provenance)
    data.write_h5ad(path)
