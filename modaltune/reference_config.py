"""The published configuration keys, read into ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def options_from_state(shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Any], list[int]]:
    """Read what the shapes of a published state_dict tell, and the pathway sizes.

    Heads, grid and the ranges of the interactions are not in it: they come from the published
    Prov-GigaPath configuration unless overridden.

    Args:
        shapes: Shape of every tensor by published name.

    Returns:
        Published options, and the number of genes of every pathway.

    Raises:
        CheckpointError: This is no published ModalTune state_dict; the message names what lacks.
    """
    needed = (
        "patch_embed.proj.weight",
        "final_norm.weight",
        "final_project.weight",
        "gene_encoder.gene_networks.0.0.0.weight",
        "gene_encoder.pathway_compression.weight",
        "interactions.0.injector.gamma",
    )
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise CheckpointError(
            "checkpoint must be a published ModalTune state_dict with a LongNet slide encoder, got "
            f"none of {', '.join(missing)}; for a bare slide encoder use "
            "LongNet.load_published"
        )

    def count(prefix: str) -> int:
        found = {name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)}
        return len(found)

    def matrix(name: str, needs: str = "", absent: int = 0) -> tuple[int, int]:
        """Return (rows, columns) of a weight, or (0, absent) where nothing begins with `needs`."""
        if needs and not any(other.startswith(needs) for other in shapes):
            return 0, absent
        found = tuple(shapes.get(name, ()))
        if len(found) < 2:
            raise CheckpointError(
                f"checkpoint must hold a matrix {name}, got "
                f"{f'shape {list(found)}' if name in shapes else 'none'}; it is damaged, or no "
                "published ModalTune state_dict"
            )
        return found[0], found[1]

    width, in_chans = matrix("patch_embed.proj.weight")
    networks, mixer = "gene_encoder.gene_networks.", "gene_encoder.mlp_mixer."
    pathways = count(networks)
    sizes = [matrix(f"{networks}{i}.0.0.weight")[1] for i in range(pathways)]
    mixers = len({n.split(".")[2] for n in shapes if n.startswith(mixer) and ".fn." in n})
    latent = matrix(f"{networks}0.0.0.weight")[0]
    attention = "interactions.0.injector.attn.q_proj."
    reduced = matrix(f"{attention}weight", attention)[0]
    tasks = matrix("task_weight.0.weight", "task_weight.", 1)[1]
    clinical = matrix("clinical_mlp.0.weight", "clinical_mlp.")[1]
    gene = {
        "latent_dim": latent,
        "depth": mixers,
        "final_groups": matrix("gene_encoder.pathway_compression.weight")[0],
        "dropout": 0.25,
        "expansion_groups": 0.5,
        "expansion_dim": 0.5,
    }
    if mixers:
        gene["expansion_groups"] = _ratio(matrix(f"{mixer}0.0.fn.0.weight")[0], pathways)
        gene["expansion_dim"] = _ratio(matrix(f"{mixer}0.1.fn.0.weight")[0], latent)
    options = {
        **PUBLISHED_GIGAPATH,
        "in_chans": in_chans,
        "embed_dim": width,
        "depth": count("encoder.layers."),
        "longnet": {"heads": 16, "ffn_dim": matrix("encoder.layers.0.ffn.fc1.weight")[0]},
        "with_cffn": reduced > 0,
        "cffn_ratio": _ratio(reduced, width) if reduced else 0.25,
        "use_extra_extractor": any(".extra_extractors." in name for name in shapes),
        "use_prompt_sa": any(name.startswith("prompt_selfattention.") for name in shapes),
        "prompt_agg": "cls" if "gene_cls" in shapes else "avg",
        "token_agg": "sum" if tuple(shapes["final_norm.weight"]) == (width,) else "cat",
        "multi_task": tasks,
        "clinical": clinical > 0,
        "clinfeat_dim": clinical or 5,
        "output_dim": matrix("final_project.weight")[0],
        "gene": gene,
    }
    return options, sizes


def check_interactions(options: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError where the interaction ranges do not fit the checkpoint's blocks."""
    found = len({n.split(".")[1] for n in shapes if n.startswith("interactions.")})
    ranges = options["interaction_indexes"]
    if len(ranges) != found or ranges[-1][1] >= options["depth"]:
        raise CheckpointError(
            f"interaction_indexes must name {found} ranges of the {options['depth']} layers, got "
            f'{ranges}; give them with --config, as {{"interaction_indexes": [[0, 1], ...]}}'
        )


def _ratio(part: int, whole: int) -> float:
    """Return a ratio that `int(whole * ratio)` turns back into `part`; a round one if it does."""
    for ratio in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0):
        if int(whole * ratio) == part:
            return ratio
    return (part + 0.5) / whole
