"""Published options into ours, and options read off the shapes of a state_dict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from modaltune.adapter import AdapterConfig
from modaltune.config import ModalTuneConfig
from modaltune.errors import CheckpointError
from modaltune.modalities import GeneConfig
from modaltune.reference_config import (
    PUBLISHED_GIGAPATH,
    check_interactions,
    config_from_reference,
    options_from_state,
    segments_from_reference,
)
from modaltune.slide_encoders.longnet import LongNetConfig

FULL_CASES = [
    "case1_sum_avg_train",
    "case2_cat_cls",
    "case3_clinical_sum_avg",
    "case4b_long_explicit_segments_train",
    "case4c_real_segments_L1500",
]
# What the shapes of tensors can't tell.
UNKNOWN = ("slide_ngrids", "num_heads", "interaction_indexes", "max_wsi_size", "segment_length")


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, "pt") as file:
        return {
            name.removeprefix("weights/"): tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118  (not a dict)
            if name.startswith("weights/")
        }


def test_the_published_options_are_our_defaults_under_the_reference_convention() -> None:
    config = config_from_reference(PUBLISHED_GIGAPATH)
    assert config == ModalTuneConfig(
        slide_encoder=LongNetConfig(wrap_positions=True), position_convention="reference"
    )
    # METHOD 3, "Real config".
    encoder = config.slide_encoder
    assert isinstance(encoder, LongNetConfig)
    assert (encoder.in_features, encoder.width, encoder.depth) == (1536, 768, 12)
    assert (encoder.heads, encoder.ffn_width, encoder.grid_cells) == (16, 3072, 1000)
    assert encoder.segment_lengths == (1024, 5792, 32768, 185363, 1048576)
    assert config.adapter == AdapterConfig(
        heads=12, bottleneck=0.25, interactions=((0, 3), (4, 7), (8, 11))
    )
    assert config.genes == GeneConfig(width=256, depth=3, tokens=64)
    assert config.out_features == 256


def test_segments_come_given_or_derived() -> None:
    assert segments_from_reference({"segment_length_effective": [4, 8]}) == (4, 8)
    assert segments_from_reference({"segment_length": [2, 3]}) == (2, 3)
    small = segments_from_reference({"max_wsi_size": 2048, "tile_size": 256})
    assert small == (1024, 512, 256, 128, 64)  # golden case 4a: log2 of 64 tiles is 6


def test_every_option_is_carried() -> None:
    options = {
        **PUBLISHED_GIGAPATH,
        "with_cffn": False,
        "use_extra_extractor": False,
        "use_prompt_sa": False,
        "prompt_agg": "cls",
        "token_agg": "cat",
        "multi_task": 1,
        "clinical": True,
        "global_pool": True,
        "dropout": 0.5,
        "drop_path_rate": 0.2,
    }
    config = config_from_reference(options)
    adapter, encoder = config.adapter, config.slide_encoder
    assert isinstance(encoder, LongNetConfig)
    assert adapter.bottleneck is None
    assert not adapter.use_extra_extractors
    assert not adapter.use_self_attention
    assert (config.prompt_agg, config.token_agg) == ("cls", "cat")
    assert (len(config.tasks), config.clinical_features, config.global_pool) == (1, 5, True)
    assert (encoder.dropout, encoder.drop_path_rate, adapter.drop_path_rate) == (0.5, 0.2, 0.2)
    assert len(config_from_reference({**options, "multi_task": 4}).tasks) == 4


def test_an_option_without_counterpart_is_refused() -> None:
    gene = {**PUBLISHED_GIGAPATH["gene"], "cls_token": True}
    with pytest.raises(CheckpointError, match=r"gene.cls_token must be off"):
        config_from_reference({**PUBLISHED_GIGAPATH, "gene": gene})


@pytest.mark.shared
@pytest.mark.parametrize("case", FULL_CASES)
def test_options_are_read_off_the_shapes(shared_dir: Path, case: str) -> None:
    path = shared_dir / "golden" / f"{case}.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    options, sizes = options_from_state(shapes_of(path.with_suffix(".safetensors")))
    assert sizes == meta["pathway_sizes"]
    told = {k: meta[k] for k in UNKNOWN if k in meta}
    told["longnet"] = meta["longnet"]  # the number of heads
    found = config_from_reference({**options, **told})
    want = config_from_reference({k: v for k, v in meta.items() if k in (*options, *told)})
    assert found == want
    assert options["longnet"]["ffn_dim"] == meta["longnet"]["ffn_dim"]


@pytest.mark.shared
def test_a_state_with_any_tensor_missing_is_no_internal_error(shared_dir: Path) -> None:
    shapes = shapes_of(shared_dir / "golden" / "case3_clinical_sum_avg.safetensors")
    messages = {}
    for name in shapes:
        try:
            options_from_state({n: s for n, s in shapes.items() if n != name})
        except CheckpointError as error:
            messages[name] = str(error)
    assert all(name in message for name, message in messages.items())
    for name in ("patch_embed.proj.weight", "clinical_mlp.0.weight", "task_weight.0.weight"):
        assert name in messages
    assert "gene_encoder.gene_networks.3.0.0.weight" in messages
    flat: dict[str, tuple[int, ...]] = {**shapes, "final_project.weight": (7,)}
    with pytest.raises(CheckpointError, match=r"matrix final_project.weight, got shape \[7\]"):
        options_from_state(flat)


def test_another_architecture_is_told_by_what_lacks() -> None:
    with pytest.raises(CheckpointError, match="must be a published ModalTune state_dict") as caught:
        options_from_state({"vision_encoder.cls_token": (1, 1, 768)})
    assert "patch_embed.proj.weight" in str(caught.value)


@pytest.mark.parametrize("ranges", [[[0, 1]], [[0, 1], [2, 12]]])
def test_ranges_must_fit_the_checkpoint(ranges: list[Any]) -> None:
    shapes = {"interactions.0.injector.gamma": (8,), "interactions.1.injector.gamma": (8,)}
    with pytest.raises(CheckpointError, match="interaction_indexes must name 2 ranges of the 12"):
        check_interactions({"interaction_indexes": ranges, "depth": 12}, shapes)
