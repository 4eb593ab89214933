"""The published state_dict layout to ours and back, losslessly.

Ours packs what the published layout keeps apart (1,324 pathway tensors become four; query, key and
value projections become one), so every rule maps a few of our tensors to a few published ones. The
same rules carry gradients and stepped weights, since all of them only move values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modaltune.adapter import Extractor, Injector, PromptSelfAttention
from modaltune.bottleneck import BottleneckAttention
from modaltune.errors import CheckpointError, WeightsError
from modaltune.modalities import GeneModality, PathwayEncoder
from modaltune.model import ModalTune
from modaltune.slide_encoders.longnet import LongNet

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """Some of our tensors, the published ones that hold the same values, and how to move them."""

    ours: tuple[str, ...]
    published: tuple[str, ...]
    to_ours: Callable[[Sequence[Tensor]], list[Tensor]]
    to_published: Callable[[Sequence[Tensor]], list[Tensor]]


def _rename(ours: str, published: str, shape: tuple[int, ...] | None = None) -> Rule:
    """One tensor under two names; `shape` is the published shape where ours is flatter."""

    def flatten(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            tensors[0].reshape([s for s in tensors[0].shape if s != 1]) if shape else tensors[0]
        ]

    def widen(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].reshape(shape) if shape else tensors[0]]

    return Rule((ours,), (published,), flatten, widen)


def _pair(ours: str, published: str) -> list[Rule]:
    return [_rename(f"{ours}.{leaf}", f"{published}.{leaf}") for leaf in ("weight", "bias")]


def _conv(ours: str, published: str, layer: nn.Linear) -> list[Rule]:
    """A linear map that is published as a 1 x 1 convolution `[out, in, 1]`."""
    shape = (*layer.weight.shape, 1)

    def squeeze(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].squeeze(-1)]

    def widen(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].reshape(shape)]

    weight = Rule((f"{ours}.weight",), (f"{published}.weight",), squeeze, widen)
    return [weight, _rename(f"{ours}.bias", f"{published}.bias")]


def _packed(ours: str, published: Sequence[str]) -> Rule:
    """Our one tensor is the published ones, one under the other, in equal parts."""
    return Rule(
        (ours,),
        tuple(published),
        lambda tensors: [torch.cat(list(tensors))],
        lambda tensors: list(tensors[0].chunk(len(published))),
    )


def _unpacked(ours: Sequence[str], published: str) -> Rule:
    """The published tensor is ours, one under the other, in equal parts."""
    return Rule(
        tuple(ours),
        (published,),
        lambda tensors: list(tensors[0].chunk(len(ours))),
        lambda tensors: [torch.cat(list(tensors))],
    )


def _stacked(ours: str, published: Sequence[str]) -> Rule:
    """Our one tensor stacks the published ones along a new first axis."""
    return Rule(
        (ours,),
        tuple(published),
        lambda tensors: [torch.stack(list(tensors))],
        lambda tensors: list(tensors[0].unbind(0)),
    )


def attention_rules(ours: str, published: str, mha: str, attn: BottleneckAttention) -> list[Rule]:
    """Rules of one adapter attention; `mha` is the published name of its inner module."""
    inner = f"{published}{mha}."
    names = ("query", "key", "value")
    rules = [_unpacked([f"{ours}.{n}.bias" for n in names], f"{inner}in_proj_bias")]
    rules += _pair(f"{ours}.out", f"{inner}out_proj")
    if attn.reduce is None:
        weights = [f"{ours}.{n}.weight" for n in names]
        return [*rules, _unpacked(weights, f"{inner}in_proj_weight")]
    for name, letter in zip(names, "qkv", strict=True):
        rules.append(_rename(f"{ours}.{name}.weight", f"{inner}{letter}_proj_weight"))
    rules += _pair(f"{ours}.reduce", f"{published}q_proj")
    return rules + _pair(f"{ours}.expand", f"{published}output_proj")


def injector_rules(ours: str, published: str, injector: Injector) -> list[Rule]:
    """Rules of one injector; prefixes end with a dot or are empty."""
    rules = attention_rules(f"{ours}attn", f"{published}attn.", "multihead_attn", injector.attn)
    rules += _pair(f"{ours}norm", f"{published}attn.norm")
    rules += _pair(f"{ours}norm_kv", f"{published}attn.norm_kq")
    return [*rules, _rename(f"{ours}gamma", f"{published}gamma")]


def extractor_rules(ours: str, published: str, extractor: Extractor) -> list[Rule]:
    """Rules of one extractor; prefixes end with a dot or are empty."""
    rules = attention_rules(f"{ours}attn", f"{published}attn.", "multihead_attn", extractor.attn)
    rules += _pair(f"{ours}norm", f"{published}attn.norm")
    rules += _pair(f"{ours}norm_kv", f"{published}attn.norm_kq")
    if extractor.ffn is not None:
        for leaf in ("linear1", "linear2", "norm"):
            rules += _pair(f"{ours}ffn.{leaf}", f"{published}ffn.{leaf}")
    return rules


def self_attention_rules(ours: str, published: str, module: PromptSelfAttention) -> list[Rule]:
    """Rules of one prompt self-attention; prefixes end with a dot or are empty."""
    rules = attention_rules(f"{ours}attn", published, "self_attn", module.attn)
    return rules + _pair(f"{ours}norm", f"{published}norm")


def gene_rules(ours: str, published: str, encoder: PathwayEncoder) -> list[Rule]:
    """Rules of the pathway encoder; prefixes end with a dot or are empty."""
    sizes = encoder.networks.offsets.diff().tolist()
    first = [f"{published}gene_networks.{i}.0.0" for i in range(len(sizes))]
    second = [f"{published}gene_networks.{i}.1.0" for i in range(len(sizes))]
    rules = [
        Rule(
            (f"{ours}networks.weight1",),
            tuple(f"{name}.weight" for name in first),
            lambda tensors: [torch.cat([t.T for t in tensors]).contiguous()],
            lambda tensors: [t.T.contiguous() for t in tensors[0].split(sizes)],
        ),
        _stacked(f"{ours}networks.bias1", [f"{name}.bias" for name in first]),
        _stacked(f"{ours}networks.weight2", [f"{name}.weight" for name in second]),
        _stacked(f"{ours}networks.bias2", [f"{name}.bias" for name in second]),
    ]
    depth = len(encoder.mixer)
    for i, block in enumerate(encoder.blocks()):
        source, target = f"{published}mlp_mixer.{i}.", f"{ours}mixer.{i}."
        rules += _conv(f"{target}token_in", f"{source}0.fn.0", block.token_in)
        rules += _conv(f"{target}token_out", f"{source}0.fn.3", block.token_out)
        rules += _pair(f"{target}token_norm", f"{source}0.norm")
        rules += _pair(f"{target}channel_in", f"{source}1.fn.0")
        rules += _pair(f"{target}channel_out", f"{source}1.fn.3")
        rules += _pair(f"{target}channel_norm", f"{source}1.norm")
    rules += _pair(f"{ours}norm", f"{published}mlp_mixer.{depth}")
    rules += _pair(f"{ours}project", f"{published}mlp_mixer.{depth + 1}")
    return rules + _pair(f"{ours}compress", f"{published}pathway_compression")


def layer_attention_rules(ours: str, published: str) -> list[Rule]:
    """Rules of a LongNet layer's attention; prefixes end with a dot or are empty."""
    rules = [
        _packed(f"{ours}qkv.{leaf}", [f"{published}{n}_proj.{leaf}" for n in "qkv"])
        for leaf in ("weight", "bias")
    ]
    rules += _pair(f"{ours}out_proj", f"{published}out_proj")
    return rules + _pair(f"{ours}attn_inner_norm", f"{published}inner_attn_ln")


def layer_rules(ours: str, published: str) -> list[Rule]:
    """Rules of one LongNet layer; prefixes end with a dot or are empty."""
    rules = layer_attention_rules(ours, f"{published}self_attn.")
    rules += _pair(f"{ours}attn_norm", f"{published}self_attn_layer_norm")
    rules += _pair(f"{ours}ffn_norm", f"{published}final_layer_norm")
    rules += _pair(f"{ours}fc1", f"{published}ffn.fc1")
    rules += _pair(f"{ours}fc2", f"{published}ffn.fc2")
    return rules + _pair(f"{ours}ffn_inner_norm", f"{published}ffn.ffn_layernorm")


def encoder_rules(ours: str, encoder: LongNet) -> list[Rule]:
    """Rules of the LongNet slide encoder."""
    rules = [_rename(f"{ours}cls_token", "cls_token", (1, 1, encoder.width))]
    rules += _pair(f"{ours}patch_embed", "patch_embed.proj")
    for i in range(encoder.depth):
        rules += layer_rules(f"{ours}layers.{i}.", f"encoder.layers.{i}.")
    return rules + _pair(f"{ours}layer_norm", "encoder.layer_norm") + _pair(f"{ours}norm", "norm")


def model_rules(model: ModalTune) -> list[Rule]:
    """Rules of a whole model with a LongNet slide encoder.

    Raises:
        CheckpointError: The slide encoder has no published ModalTune layout, or there are further
            modalities, which that layout can't hold.
    """
    if not isinstance(model.slide_encoder, LongNet):
        raise CheckpointError(
            "the published layout must hold a LongNet slide encoder, got "
            f"{type(model.slide_encoder).__name__}; keep such a model in a run folder"
        )
    further = sorted(set(model.modalities) - {"genes", "clinical"})
    if further:
        raise CheckpointError(f"the published layout can't hold further modalities, got {further}")
    rules = encoder_rules("slide_encoder.", model.slide_encoder)
    rules.append(_rename("modal_positions", "gene_pe"))
    for n, block in enumerate(model.adapter.interactions()):
        ours, published = f"adapter.blocks.{n}.", f"interactions.{n}."
        rules += injector_rules(f"{ours}injector.", f"{published}injector.", block.injector)
        rules += extractor_rules(f"{ours}extractor.", f"{published}extractor.", block.extractor)
        for i, extra in enumerate(block.extractors()[1:]):
            name = f"extra_extractors.{i}."
            rules += extractor_rules(f"{ours}{name}", f"{published}{name}", extra)
    for n, attention in enumerate(model.adapter.self_attentions()):
        rules += self_attention_rules(
            f"adapter.self_attention.{n}.", f"prompt_selfattention.{n + 1}.", attention
        )
    if "genes" in model.modalities:
        genes = model.modalities["genes"]
        if isinstance(genes, GeneModality):
            rules += gene_rules("modalities.genes.encoder.", "gene_encoder.", genes.encoder)
            if genes.cls_token is not None:
                width = model.slide_encoder.width
                rules.append(_rename("modalities.genes.cls_token", "gene_cls", (1, 1, width)))
    if "clinical" in model.modalities:
        rules += _pair("modalities.clinical.linear1", "clinical_mlp.0")
        rules += _pair("modalities.clinical.linear2", "clinical_mlp.2")
        rules += _pair("modalities.clinical.norm", "clinical_mlp.3")
    if model.task_prompts is not None:
        rules += _pair("task_prompts.embed", "task_weight.0")
        rules += _pair("task_prompts.norm", "task_weight.1")
    return rules + _pair("head_norm", "final_norm") + _pair("head_project", "final_project")


def to_published(rules: Iterable[Rule], tensors: State) -> dict[str, Tensor]:
    """Move tensors from our names to published ones; rules of absent tensors are left out."""
    moved: dict[str, Tensor] = {}
    for rule in rules:
        if all(name in tensors for name in rule.ours):
            values = rule.to_published([tensors[name] for name in rule.ours])
            moved.update(zip(rule.published, values, strict=True))
    return moved


def from_published(
    rules: Sequence[Rule], state: State, expected: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Move a published state to our names, complete and checked.

    Raises:
        CheckpointError: Keys are missing or unexpected, or shapes differ; all of them are named.
    """
    wanted = {name for rule in rules for name in rule.published}
    problems = [f"missing: {_listed(wanted - set(state))}"] if wanted - set(state) else []
    if set(state) - wanted:
        problems.append(f"unexpected: {_listed(set(state) - wanted)}")
    moved: dict[str, Tensor] = {}
    wrong = []
    for rule in rules:
        if any(name not in state for name in rule.published):
            continue
        shapes = [
            tuple(t.shape)
            for t in rule.to_published(
                [torch.empty_like(expected[n], device="meta") for n in rule.ours]
            )
        ]
        for name, shape in zip(rule.published, shapes, strict=True):
            if tuple(state[name].shape) != shape:
                wrong.append(f"{name} {list(state[name].shape)} instead of {list(shape)}")
        if not wrong:
            values = rule.to_ours([state[name] for name in rule.published])
            moved.update(zip(rule.ours, values, strict=True))
    if wrong:
        problems.append(f"of another shape: {_listed(wrong)}")
    if problems:
        raise CheckpointError(
            f"{source} must hold the published layout of this architecture; tensors "
            + "; ".join(problems)
            + ". Check the configuration (pathways, tasks, clinical, widths) it was trained with"
        )
    return moved


def _listed(names: Iterable[str], most: int = 8) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def model_from_reference(model: ModalTune, state: State, source: str = "checkpoint") -> None:
    """Load a published-layout ModalTune state_dict into `model`.

    Raises:
        CheckpointError: Keys or shapes do not fit; nothing is loaded then.
    """
    own = model.state_dict()
    model.load_state_dict(from_published(model_rules(model), state, own, source))


def model_to_reference(model: ModalTune) -> dict[str, Tensor]:
    """Return the published-layout state_dict of `model`; tensors are views where they can be."""
    return to_published(model_rules(model), model.state_dict())


def encoder_from_reference(encoder: LongNet, state: State, source: str) -> None:
    """Load the published slide encoder weights (`slide_encoder.pth`) into `encoder`.

    The published file may hold more than the encoder (a decoder of pre-training, the position
    table): such keys are left out only if they are known to be unused.

    Raises:
        WeightsError: Keys or shapes do not fit.
    """
    unused = {
        name for name in state if name == "pos_embed" or name.startswith(("decoder", "mask_"))
    }
    kept = {name: tensor for name, tensor in state.items() if name not in unused}
    try:
        moved = from_published(encoder_rules("", encoder), kept, encoder.state_dict(), source)
    except CheckpointError as error:
        raise WeightsError(str(error)) from error
    encoder.load_state_dict(moved)
