"""What tests of training share: the gradient of one batch, and small cases to train on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from modaltune.batch import CaseBatch
from modaltune.cases_folder import CasesContent, write_cases_folder
from modaltune.clinical import COLUMNS
from modaltune.engine.cohort import SlideItem
from modaltune.learner import ModalTuneLearner, Targets, check_finite
from modaltune.model import ModalTune
from modaltune.pathways import PathwayTable
from modaltune.run_config import RunConfig, load_run_config
from modaltune.splits import Split
from modaltune.testing_features import small_features
from modaltune.text_embeddings import PrecomputedText
from modaltune.train_config import TrainConfig


def accumulate_gradients(
    model: ModalTune, batch: CaseBatch, text: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Add the gradient of a model's loss, as a training step does; return embeddings and loss.

    Args:
        model: In the mode it should run in.
        batch: B cases.
        text: `[B, T, out]` unit target rows.
        config: Temperature and weight of the loss, and when passes are pulled back.
    """
    learner = ModalTuneLearner(model, config)

    def backward(loss: Tensor) -> None:
        check_finite(loss, model, batch)
        loss.backward()

    loss = learner.accumulate(batch, Targets.of_text(text), backward)
    if learner.outputs is None:
        raise RuntimeError("a learner must keep the embeddings of its batch")
    return learner.outputs, loss


def write_training_cases(
    folder: Path,
    *,
    parts: tuple[int, int, int] = (10, 6, 4),
    width: int = 6,
    tiles: tuple[int, int] = (3, 9),
    seed: int = 0,
    prefix: str = "P",
) -> Path:
    """Write a small cases folder with feature files, and embeddings of its labels beside it.

    Class and risk follow from the first genes; every fifth case has two slides, every seventh no
    slide, every sixth no genes.

    Args:
        folder: `cases/` and `text.safetensors` are written into it.
        parts: Cases of training, validation and test.
        width: Tile feature width.
        tiles: Fewest and most tiles of a slide.
        seed: Of everything.
        prefix: Of the case ids.

    Returns:
        The cases folder.
    """
    rng = np.random.default_rng(seed)
    ids = [f"{prefix}{i:03d}" for i in range(sum(parts))]
    classes = np.arange(len(ids)) % 2
    genes = rng.normal(size=(len(ids), 8))
    genes[:, :3] += 2.5 * classes[:, None]
    slides = []
    for i, case in enumerate(ids):
        for name in [] if i % 7 == 6 else [f"{case}-A", *([f"{case}-B"] if i % 5 == 4 else [])]:
            path = folder / "features" / f"{name}.h5"
            count = int(rng.integers(tiles[0], tiles[1] + 1))
            item = SlideItem(Path(f"{name}.tiff"), name, case, 0.5)
            small_features(path, item, tiles=count, width=width)
            slides.append((case, name, str(path.parent), path.name, "modaltune", count, width))
    columns = ["case_id", "slide", "root", "features", "producer", "tiles", "width"]
    table = pd.DataFrame(slides, columns=columns).assign(
        encoder="small", base_mpp=0.5, target_mpp=0.5
    )
    frame = pd.DataFrame(index=pd.Index(ids, name="case_id"), columns=list(COLUMNS), dtype=object)
    frame["project"], frame["site"], frame["sex"] = "TEST", "breast", "female"
    frame["age"] = rng.uniform(30, 80, len(ids))
    frame["diagnosis"] = np.where(classes == 1, "lobular carcinoma", "ductal carcinoma")
    frame["stage"], frame["primary_class"] = "Stage II", classes
    frame["survival_months"] = rng.exponential(30, len(ids)) + 20 * classes
    frame["event"] = (rng.random(len(ids)) < 0.7).astype(float)
    frame["slides"] = [()] * len(ids)
    symbols = [f"G{k}" for k in range(genes.shape[1])]
    expression = pd.DataFrame(genes, index=frame.index, columns=symbols).astype(np.float32)
    content = CasesContent(
        clinical=frame,
        expression=expression.iloc[[i for i in range(len(ids)) if i % 6 != 5]],
        pathways=PathwayTable(("one", "two"), (tuple(symbols[:5]), tuple(symbols[3:]))),
        slides=table,
        splits=[Split(*(tuple(part) for part in np.split(ids, np.cumsum(parts)[:-1])))],
    )
    side = rng.normal(size=(2, 4, 12))
    rows = {case: 0.3 * rng.normal(size=(4, 12)) + side[classes[i]] for i, case in enumerate(ids)}
    PrecomputedText.from_arrays(rows).save(folder / "text.safetensors")
    return write_cases_folder(folder / "cases", content).path


def tiny_run_config(cases: Sequence[Path], out: Path, *sets: str) -> RunConfig:
    """Return a configuration that trains in a second on cases of `write_training_cases`.

    Args:
        cases: Cases folders; `text.safetensors` is taken from beside the first.
        out: Run folder.
        sets: Further `key.sub=value`.
    """
    named = ", ".join(json.dumps(str(folder)) for folder in cases)
    tiny = (
        f"cases.folders=[{named}]",
        f"text.embeddings={json.dumps(str(cases[0].parent / 'text.safetensors'))}",
        f"output.folder={json.dumps(str(out))}",
        "model.slide_encoder.width=16",
        "model.slide_encoder.ffn_width=16",
        "model.out_features=10",
        "model.adapter.heads=2",
        "model.genes.width=8",
        "model.genes.tokens=3",
        "training.epochs=3",
        "training.warmup_epochs=1",
        "training.cases_per_step=2",
        "training.device=cpu",
    )
    return load_run_config(preset="small", sets=[*tiny, *sets])
