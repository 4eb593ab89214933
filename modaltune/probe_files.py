"""Probes on disk: `probes.json` describes, `probes.safetensors` holds the arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from modaltune.checkpoint import file_sha256
from modaltune.engine.atomic import atomic_path, write_json_atomic
from modaltune.errors import CheckpointError
from modaltune.fitted_probes import FittedProbes, SavedCox, ScopeProbes
from modaltune.probes import LogisticProbe
from modaltune.survival_metrics import SurvivalReference

FORMAT_VERSION = 1
DESCRIPTION, ARRAYS = "probes.json", "probes.safetensors"


def save_probes(folder: str | Path, probes: FittedProbes) -> Path:
    """Write probes into a folder, such as a run's; the description comes last."""
    folder = Path(folder)
    arrays: dict[str, Any] = {}
    scopes = [
        {"task": task, "scope": scope, **_describe(own, f"{task}/{scope}", arrays)}
        for (task, scope), own in probes.probes.items()
    ]
    sites = {
        task: _pack_logistic(probe, f"{task}/site", arrays)
        for task, probe in probes.site_probes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    with atomic_path(folder / ARRAYS) as temporary:
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, temporary)
    write_json_atomic(
        folder / DESCRIPTION,
        {
            "format": "modaltune-probes",
            "format_version": FORMAT_VERSION,
            "tasks": list(probes.tasks),
            "sites": list(probes.sites),
            "scopes": scopes,
            "site_probes": sites,
            "arrays_sha256": file_sha256(folder / ARRAYS),
            "info": dict(probes.info),
        },
    )
    return folder / DESCRIPTION


def load_probes(folder: str | Path) -> FittedProbes:
    """Read probes of a folder, verified.

    Raises:
        CheckpointError: There are none, or they are damaged or of another format.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file() or not (folder / ARRAYS).is_file():
        raise CheckpointError(
            f"{folder} must hold {DESCRIPTION} and {ARRAYS}, got no fitted probes; fit them with: "
            f"modaltune evaluate {folder}"
        )
    try:
        read = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if read.get("format") != "modaltune-probes" or read["format_version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{folder / DESCRIPTION} must be modaltune-probes of format {FORMAT_VERSION} or "
                f"older, got {read.get('format')!r} {read.get('format_version')}; update modaltune"
            )
        if file_sha256(folder / ARRAYS) != read["arrays_sha256"]:
            raise CheckpointError(
                f"{folder / ARRAYS} must have the checksum that {DESCRIPTION} states, got another; "
                "evaluate the run again"
            )
        arrays = load_file(folder / ARRAYS)
        return FittedProbes(
            tuple(read["tasks"]),
            tuple(read["sites"]),
            {(s["task"], s["scope"]): _rebuild(s, arrays) for s in read["scopes"]},
            {t: _unpack_logistic(s, f"{t}/site", arrays) for t, s in read["site_probes"].items()},
            read["info"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder / DESCRIPTION} must describe fitted probes, got: {error!r}; evaluate the run "
            "again"
        ) from error


def _describe(own: ScopeProbes, key: str, arrays: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "notes": list(own.notes),
        "risk_cut": own.risk_cut,
        "logistic": None,
        "cox": None,
        "reference": None,
    }
    if own.logistic is not None:
        described["logistic"] = _pack_logistic(own.logistic, key, arrays)
    if own.cox is not None:
        cox = own.cox
        for name in ("params", "times", "cumulative_hazard"):
            arrays[f"{key}/cox.{name}"] = getattr(cox, name)
        names = ("offset", "converged", "num_cases", "num_events", "penalizer")
        described["cox"] = {name: getattr(cox, name) for name in names} | {"notes": list(cox.notes)}
    if own.reference is not None:
        state = own.reference.to_dict()
        described["reference"] = {"tau": state.pop("tau")}
        arrays.update({f"{key}/reference.{n}": np.asarray(v) for n, v in state.items()})
    return described


def _pack_logistic(probe: LogisticProbe, key: str, arrays: dict[str, Any]) -> dict[str, Any]:
    arrays[f"{key}/logistic.coef"] = probe.coef
    arrays[f"{key}/logistic.intercept"] = probe.intercept
    return {
        "labels": probe.labels.tolist(),
        "converged": bool(probe.converged),
        "num_cases": probe.num_cases,
    }


def _unpack_logistic(
    state: Mapping[str, Any], key: str, arrays: Mapping[str, Any]
) -> LogisticProbe:
    return LogisticProbe(
        np.asarray(state["labels"], np.int64),
        arrays[f"{key}/logistic.coef"],
        arrays[f"{key}/logistic.intercept"],
        state["converged"],
        state["num_cases"],
    )


def _rebuild(state: Mapping[str, Any], arrays: Mapping[str, Any]) -> ScopeProbes:
    key = f"{state['task']}/{state['scope']}"
    logistic = cox = reference = None
    if state["logistic"] is not None:
        logistic = _unpack_logistic(state["logistic"], key, arrays)
    if state["cox"] is not None:
        cox = SavedCox(
            **{n: arrays[f"{key}/cox.{n}"] for n in ("params", "times", "cumulative_hazard")},
            **{**state["cox"], "notes": tuple(state["cox"]["notes"])},
        )
    if state["reference"] is not None:
        prefix = f"{key}/reference."
        own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        reference = SurvivalReference.from_dict({**own, **state["reference"]})
    return ScopeProbes(logistic, cox, state["risk_cut"], reference, tuple(state["notes"]))
