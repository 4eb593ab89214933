"""Which learner is trained: one section per kind, checked against the baseline's own settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from modaltune.baselines import BASELINES
from modaltune.config_text import to_toml
from modaltune.errors import InputError
from modaltune.run_config import load_run_config


@pytest.mark.parametrize("kind", BASELINES)
def test_every_baseline_has_a_section_with_its_own_settings(kind: str, tmp_path: Path) -> None:
    config = load_run_config(preset="small", sets=[f"learner.kind={kind}"])
    assert config.learner.kind == kind
    assert type(config.learner.settings) is BASELINES[kind].settings
    assert config.learner.settings == BASELINES[kind].settings()  # the paper's
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config))
    assert load_run_config(path) == config
    assert "[learner.settings" in path.read_text()


def test_modaltune_is_trained_unless_another_is_named() -> None:
    config = load_run_config()
    assert config.learner.kind == "modaltune"
    assert config.read_inputs == config.inputs
    other = load_run_config(sets=["learner.kind=abmil"])
    assert config.differences(other.model_dump(mode="json"))[:2] == [
        "learner.balanced", "learner.bins",
    ]  # fmt: skip


def test_settings_may_be_given_field_by_field_or_as_a_table() -> None:
    one = load_run_config(
        sets=["learner.kind=late_fusion", "learner.settings.image.width=16", "learner.survival=cox"]
    )
    two = load_run_config(
        sets=["learner={kind='late_fusion', survival='cox', settings={image={width=16}}}"]
    )
    assert one == two
    assert one.learner.settings.image.width == 16
    assert one.learner.settings.genes.width == 256


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["learner.kind=forest"], r"learner.kind must be one of modaltune, .*mcat.*, got 'forest'"),
        (["learner.survival=cox"], r"learner.survival must be a known field.*allowed here: kind;"),
        (
            ["learner.kind=abmil", "learner.settings.widht=3"],
            r"learner.settings.widht must be a known field.*here: width, attention_width, dropout;",
        ),
        (
            ["learner.kind=mcat", "learner.settings.width=0"],
            r"learner.settings.width must be greater than 0, got 0",
        ),
        (
            ["learner.kind=mcat", "learner.settings.width=12"],
            r"learner.settings: heads must divide width, got 8 and 12",
        ),
        (
            ["learner.kind=late_fusion", "learner.settings.genes.dropout=1"],
            r"learner.settings.genes.dropout must be less than 1, got 1",
        ),
        (
            ["learner.kind=abmil", "learner.survival=weibull"],
            r"learner.survival must be 'hazard', 'cox' or 'none', got 'weibull'",
        ),
        (
            ["learner.kind=abmil", "learner.classes=false", "learner.survival=none"],
            r"learner must have a head: classes = true, or survival hazard or cox",
        ),
        (
            ["learner.kind=abmil", "inputs.image=false"],
            r"inputs.image must be true for learner.kind = abmil, which reads slides, got false; "
            r"set it to true, or choose pathway_mlp or gene_mixer",
        ),
        (
            ["learner.kind=mcat", "inputs.genes=false"],
            r"inputs.genes must be true for learner.kind = mcat, which reads genes, got false; "
            r"set it to true, or choose linear_probe or abmil",
        ),
    ],
)
def test_errors_name_the_field_and_the_way_out(given: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_run_config(sets=given)


@pytest.mark.parametrize(
    ("kind", "image", "genes"),
    [("abmil", True, False), ("gene_mixer", False, True), ("late_fusion", True, True)],
)
def test_a_baseline_reads_what_it_reads_and_no_clinical_tokens(
    kind: str, image: bool, genes: bool
) -> None:
    config = load_run_config(sets=[f"learner.kind={kind}", "inputs.clinical=default"])
    read = config.read_inputs
    assert (read.image, read.genes, read.clinical) == (image, genes, "none")
    assert read.max_tiles == config.inputs.max_tiles
