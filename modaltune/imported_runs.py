"""Published checkpoints as run folders, and run folders as published checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modaltune.checkpoint import Run, load_run, save_run
from modaltune.config import ModalTuneConfig
from modaltune.engine.atomic import atomic_path
from modaltune.engine.untrusted_pt import UntrustedPtError, load_pt_tensors
from modaltune.errors import CheckpointError, InputError
from modaltune.model import ModalTune
from modaltune.pathways import PathwayIndex, read_pathways
from modaltune.preprocessing import Preprocessing, TileRecipe
from modaltune.reference_config import (
    check_interactions,
    config_from_reference,
    options_from_state,
)
from modaltune.reference_import import model_from_reference, model_to_reference


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state_dict of plain tensors: `.safetensors`, or torch's format in a child process.

    Raises:
        CheckpointError: The file is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} must be an existing file, got none")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return {name: torch.from_numpy(array) for name, array in load_pt_tensors(path).items()}
    except (SafetensorError, UntrustedPtError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {path} must be a readable file of named tensors, got: {error}"
        ) from error


def import_checkpoint(
    path: Path, out: Path, *, pathways: Path | None = None, options: Path | None = None
) -> Run:
    """Turn a published ModalTune state_dict into a run folder.

    Args:
        path: The state_dict.
        out: Run folder to write.
        pathways: The pathway table it was trained with, which gives genes their names. Without
            it, gene inputs are the pathway vectors one behind the other, named `pathway/position`.
        options: JSON of published configuration keys that the tensors do not tell
            (`interaction_indexes`, `num_heads`, `slide_ngrids`, ...).

    Returns:
        The run, as written. Genes are expected standardised: the published layout keeps no scaler.

    Raises:
        CheckpointError: Keys or shapes do not fit; they are named, and nothing is written.
        InputError: The options are unreadable or no valid configuration.
    """
    state = read_state(path)
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    found, sizes = options_from_state(shapes)
    _check_values(state, path)
    merged = {**found, **_read_options(options)}
    config = _config(merged, shapes)
    index = _pathway_index(pathways, sizes)
    model = ModalTune(config, gene_index=index.indices, gene_offsets=index.offsets)
    model_from_reference(model, state, str(path))
    run = Run(
        model.eval(),
        Preprocessing(tiles=TileRecipe(width=merged["in_chans"]), pathways=index),
        info={"imported_from": path.name, "layout": "published"},
    )
    save_run(out, run)
    return run


def export_checkpoint(run_folder: Path, out: Path) -> dict[str, Tensor]:
    """Write a run's weights as a published-layout state_dict (safetensors).

    Raises:
        InputError: The name does not end in `.safetensors`.
        CheckpointError: The run's architecture has no published layout.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"out must end in .safetensors, got {out.name}; we write no pickle")
    state = model_to_reference(load_run(run_folder).model)
    with atomic_path(out) as temporary:
        save_file({name: t.clone().contiguous() for name, t in state.items()}, temporary)
    return state


def _config(options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModalTuneConfig:
    try:
        check_interactions(options, shapes)
        return config_from_reference(options)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"config must hold valid values of published configuration keys, got: {error}; correct "
            "them"
        ) from error


def _check_values(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that our float32 can't hold to the bit, or that are no numbers."""
    wide = (torch.float32, torch.float16, torch.bfloat16)
    bad = [n for n, t in state.items() if t.dtype not in wide or not bool(torch.isfinite(t).all())]
    if bad:
        raise CheckpointError(
            f"checkpoint {path} must hold finite floats of at most 32 bits, got others in "
            f"{len(bad)} tensor(s), such as {', '.join(sorted(bad)[:5])}; save it with .float()"
        )


def _read_options(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"config {path} must be readable JSON, got: {error}") from error
    if not isinstance(options, dict):
        raise InputError(f"config {path} must be a JSON object, got {type(options).__name__}")
    return options


def _pathway_index(path: Path | None, sizes: list[int]) -> PathwayIndex:
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    if path is None:
        names = tuple(f"pathway{p}" for p in range(len(sizes)))
        genes = tuple(f"{n}/{i}" for n, size in zip(names, sizes, strict=True) for i in range(size))
        return PathwayIndex(genes, names, torch.arange(len(genes)), offsets, (), (), tuple(sizes))
    table = read_pathways(path)
    every = {gene for genes in table.genes for gene in genes}
    index = PathwayIndex.build(table, every)
    if list(index.sizes) != sizes:
        wrong = sum(a != b for a, b in zip(index.sizes, sizes, strict=False))
        raise CheckpointError(
            f"pathways {path} must be the table the checkpoint was trained with ({len(sizes)} "
            f"pathways), got {len(index.sizes)} pathways, {wrong} of another size; find that "
            "table, or leave it out"
        )
    return index
