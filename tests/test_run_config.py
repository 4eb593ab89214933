"""One configuration: every knob with unit and default, in layers, and errors that name fields."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from modaltune.config_text import to_toml
from modaltune.errors import InputError
from modaltune.run_config import PRESETS, RunConfig, load_run_config
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.slide_encoders.titan import TitanConfig


def knobs(kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in kind.model_fields.items():
        inner = [
            k for k in (field.annotation, *get_args(field.annotation))
            if isinstance(k, type) and issubclass(k, BaseModel)
        ]  # fmt: skip
        if inner:
            for one in inner:
                yield from knobs(one, f"{path}{name}.")
        else:
            yield path + name, field


def test_every_knob_says_what_it_means_and_has_a_default() -> None:
    found = [*knobs(RunConfig), *knobs(LongNetConfig), *knobs(TitanConfig)]
    assert len(found) > 70
    for name, field in found:
        assert field.description, name
        assert not field.is_required(), name


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("explained", [True, False])
def test_what_is_printed_is_read_back_to_the_same(
    preset: str | None, explained: bool, tmp_path: Path
) -> None:
    config = load_run_config(preset=preset)
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config, explained=explained))
    assert load_run_config(path) == config
    assert config.preset == preset


def test_presets_hold_the_published_figures() -> None:
    gigapath = load_run_config(preset="prov-gigapath")
    assert (gigapath.inputs.tile_limit, gigapath.inputs.max_tiles) == ("random", 25_000)
    assert (gigapath.training.lr, gigapath.training.weight_decay) == (1e-4, 5e-4)
    assert gigapath.training.loss_factor == 10
    assert gigapath.training.cases_per_step == 1
    titan = load_run_config(preset="titan")
    assert titan.model.slide_encoder.kind == "titan"
    assert titan.inputs.max_tiles == 15_000
    assert titan.model.adapter.interactions == ((0, 1), (2, 3), (4, 5))
    assert (titan.model.token_agg, titan.model.prompt_agg) == ("cat", "avg")
    small = load_run_config(preset="small")
    assert small.model.random_backbone
    assert not gigapath.model.random_backbone
    genes = load_run_config(preset="genes")
    assert (genes.inputs.image, genes.inputs.genes) == (False, True)
    # The last epoch is kept, since it is the only one judged.
    assert genes.training.validate_every > genes.training.epochs  # the last epoch is kept


def test_later_layers_win(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'preset = "small"\n[training]\nepochs = 7\nlr = 2e-3\n[model.slide_encoder]\nwidth = 48\n'
    )
    config = load_run_config(path, sets=["training.lr=5e-4", "inputs.clinical=default"])
    assert (config.training.epochs, config.training.lr) == (7, 5e-4)
    assert config.model.slide_encoder.width == 48
    assert config.model.out_features == 64  # the preset's
    assert config.inputs.clinical == "default"
    none = load_run_config(sets=["inputs.clip_quantiles=none", "inputs.clinical=none"])
    assert none.inputs.clip_quantiles is None
    assert none.inputs.clinical == "none"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "inputs.tile_limit=some",
            "inputs.tile_limit must be 'all', 'random' or 'every_epoch', got 'some'",
        ),
        ("training.epochs=0", "training.epochs must be greater than 0, got 0"),
        ("inputs.tiles=1", "inputs.tiles must be a known field.*allowed here: image, genes, clin"),
        ("model.slide_encoder.widht=5", "model.slide_encoder.widht must be a known field.*width"),
        ("model.adapter.bottleneck=2", r"bottleneck must lie in \(0, 1\]"),
        ('model.tasks=["a"]', "model.tasks must be among general, diagnosis, stage, survival"),
        ("inputs", "--set must be key.sub=value, got 'inputs'"),
        ("training.epochs.x=1", "training.epochs"),
        ("preset=huge", "preset must be one of prov-gigapath, titan, small, genes, got 'huge'"),
    ],
)
def test_errors_name_field_rule_and_what_is_allowed(given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_run_config(sets=[given])


def test_neither_image_nor_genes_is_refused() -> None:
    with pytest.raises(InputError, match="inputs must have image or genes or both, got neither"):
        load_run_config(sets=["inputs.image=false", "inputs.genes=false"])


def test_files_that_are_no_configuration_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a TOML file, got .*none.toml"):
        load_run_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(InputError, match=r"bad.toml must be TOML"):
        load_run_config(tmp_path / "bad.toml")


def test_differences_name_fields_but_not_where_output_goes() -> None:
    one = load_run_config(preset="small")
    other = load_run_config(
        preset="small", sets=["training.lr=0.5", "model.genes.width=8", "output.keep_last=9"]
    )
    assert one.differences(other.model_dump(mode="json")) == ["model.genes.width", "training.lr"]
    assert one.differences(one.model_dump(mode="json")) == []
    before = one.model_dump(mode="json")
    del before["learner"], before["training"]["choose_by"]  # as written before these were fields
    assert one.differences(before) == []
    assert one.differences({"strange": 1}) != []
