"""The published configuration keys, read into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modaltune.adapter import AdapterConfig
from modaltune.config import PUBLISHED_TASKS, ModalTuneConfig
from modaltune.errors import CheckpointError
from modaltune.modalities import GeneConfig
from modaltune.slide_encoders.longnet import LongNetConfig, published_segments

# The published Prov-GigaPath model, in published keys: what a bare state_dict does not tell.
PUBLISHED_GIGAPATH: dict[str, Any] = {
    "in_chans": 1536,
    "embed_dim": 768,
    "depth": 12,
    "slide_ngrids": 1000,
    "tile_size": 256,
    "max_wsi_size": 262144,
    "dropout": 0.25,
    "drop_path_rate": 0.1,
    "longnet": {"heads": 16, "ffn_dim": 3072},
    "num_heads": 12,
    "output_dim": 256,
    "interaction_indexes": [[0, 3], [4, 7], [8, 11]],
    "with_cffn": True,
    "cffn_ratio": 0.25,
    "use_extra_extractor": True,
    "use_prompt_sa": True,
    "prompt_agg": "avg",
    "token_agg": "sum",
    "multi_task": 3,
    "clinical": False,
    "clinfeat_dim": 5,
    "global_pool": False,
    "gene": {
        "latent_dim": 256,
        "depth": 3,
        "expansion_groups": 0.5,
        "expansion_dim": 0.5,
        "dropout": 0.25,
        "final_groups": 64,
    },
}


def segments_from_reference(options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the segment lengths of published options: given ones, else derived from sizes."""
    for key in ("segment_length_effective", "segment_length"):
        if options.get(key):
            return tuple(options[key])
    return published_segments(options.get("max_wsi_size", 262_144), options.get("tile_size", 256))


def longnet_from_reference(options: Mapping[str, Any]) -> LongNetConfig:
    """Return the slide encoder's configuration from published options."""
    longnet = options.get("longnet", {})
    width = options["embed_dim"]
    segments = segments_from_reference(options)
    return LongNetConfig(
        in_features=options["in_chans"],
        width=width,
        depth=options["depth"],
        heads=longnet.get("heads", 16),
        ffn_width=longnet.get("ffn_dim", 4 * width),
        grid_cells=options["slide_ngrids"],
        segment_lengths=segments,
        dilation_ratios=tuple(options.get("dilated_ratio", (1, 2, 4, 8, 16)[: len(segments)])),
        wrap_positions=True,
        dropout=options.get("dropout", 0.25),
        drop_path_rate=options.get("drop_path_rate", 0.1),
    )


def config_from_reference(options: Mapping[str, Any]) -> ModalTuneConfig:
    """Return our configuration from published options (`position_convention = "reference"`).

    Raises:
        CheckpointError: An option has no counterpart here.
    """
    tasks = int(options.get("multi_task", 1))
    gene = options["gene"]
    if gene.get("cls_token"):
        raise CheckpointError(
            "gene.cls_token must be off, got on; the published configurations never use it"
        )
    adapter = AdapterConfig(
        heads=options["num_heads"],
        bottleneck=float(options["cffn_ratio"]) if options["with_cffn"] else None,
        interactions=tuple((a, b) for a, b in options["interaction_indexes"]),
        use_extra_extractors=options["use_extra_extractor"],
        use_self_attention=options["use_prompt_sa"],
        drop_path_rate=options.get("drop_path_rate", 0.1),
    )
    return ModalTuneConfig(
        slide_encoder=longnet_from_reference(options),
        adapter=adapter,
        genes=GeneConfig(
            width=gene["latent_dim"],
            depth=gene["depth"],
            token_expansion=gene["expansion_groups"],
            channel_expansion=gene["expansion_dim"],
            tokens=gene["final_groups"],
            dropout=gene.get("dropout", 0.25),
        ),
        clinical_features=options.get("clinfeat_dim", 5) if options.get("clinical") else 0,
        tasks=PUBLISHED_TASKS if tasks == 3 else tuple(f"task{i}" for i in range(max(tasks, 1))),
        token_agg=options["token_agg"],
        prompt_agg=options["prompt_agg"],
        global_pool=bool(options.get("global_pool", False)),
        out_features=options["output_dim"],
        position_convention="reference",
    )
