"""Useful floating point operations of a model, counted exactly from its shape.

A product of `[m, k]` and `[k, n]` counts 2 m k n; attention counts its two products. Counted is
what the result needs: projections that meet tiles in folded form, dilated attention over the keys
that exist (not over zero padding), each stage once per task only where it differs by task. What
tasks share of the first injector where no gradient is wanted (under 0.1 %) is counted for each all
the same; normalisations, activations and softmax (under 1 %) are not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modaltune.adapter import Injector, PromptSelfAttention
from modaltune.bottleneck import BottleneckAttention
from modaltune.errors import InputError
from modaltune.modalities import ClinicalModality, GeneModality
from modaltune.model import ModalTune
from modaltune.slide_encoders.longnet import LongNet, LongNetConfig


@dataclass(frozen=True)
class Work:
    """FLOPs of one stage.

    Attributes:
        products: Of matrix products.
        attention: Of fused attention.
    """

    products: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        """Both together."""
        return self.products + self.attention

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.attention + other.attention)

    def __mul__(self, factor: float) -> Work:
        return Work(self.products * factor, self.attention * factor)


def count_flops(
    model: ModalTune, tiles: Sequence[int], *, tasks: int = 3, training: bool = False
) -> dict[str, Work]:
    """Return the useful FLOPs of a call, by stage as profiles name it.

    Args:
        model: On a LongNet.
        tiles: Tiles of each case.
        tasks: Task prompts asked for. Under a shared trunk it runs once for all of them.
        training: Count the backward pass too: as much again for gradients of inputs, and of
            trainable weights; attention twice as much again. What is recomputed does not count.

    Raises:
        InputError: The slide encoder is no LongNet.
    """
    encoder = model.slide_encoder
    if not isinstance(encoder, LongNet):
        raise InputError(
            f"FLOPs are counted for a LongNet, got {type(encoder).__name__}; profile without them"
        )
    trunks = 1 if model.config.task_trunk == "shared" else tasks
    found: dict[str, Work] = defaultdict(Work)
    filled = [count for count in tiles if count]
    width, rows = encoder.width, sum(filled)
    found["embed"] += Work(2.0 * rows * encoder.in_features * width)
    tuned = 3 if training else 1  # a trainable product has two more in backward
    for name, module in model.each_modality().items():
        found[f"modality.{name}"] += _modality(module, width) * (len(tiles) * tuned)
    modal = model.modal_positions.shape[0] + (tasks - 1 if trunks == 1 and model.has_tasks else 0)
    has_gradient = False  # a block before the first injector passes none on
    for n, block in enumerate(model.adapter.interactions()):
        if n > 0 and model.adapter.self_attentions():
            attention = model.adapter.self_attentions()[n - 1]
            work = _self_attention(attention, width, modal) * (len(tiles) * trunks)
            found["self_attention"] += work * tuned
        one = _injector(block.injector, width, rows, modal, len(filled)) * trunks
        found["injector"] += one * tuned
        has_gradient = has_gradient or training
        for part, work in layer_flops(encoder.config, filled).items():
            layers = block.last - block.first + 1
            frozen = Work(work.products * 2, work.attention * 3) if has_gradient else work
            found[part] += frozen * (layers * trunks)
        extraction = _extractor(block.extractor.attn, width, rows, modal, len(filled))
        count = len(block.extractors()) * trunks * tuned
        found["extractor"] += extraction * count
    before = min(model.adapter.first_block, encoder.depth)
    for part, work in layer_flops(encoder.config, filled).items():
        found[part] += work * before
    head = Work(2.0 * model.head_project.in_features * model.head_project.out_features)
    found["head"] += head * (len(tiles) * tasks * tuned)
    return dict(found)


def layer_flops(config: LongNetConfig, tiles: Sequence[int]) -> Mapping[str, Work]:
    """Return the FLOPs of one LongNet layer over packed cases (with their cls token)."""
    rows, width = sum(tiles) + len(tiles), config.width
    pairs = sum(dilated_pairs(config, count + 1) for count in tiles)
    head_width = width // config.heads
    return {
        "longnet.attention": Work(2.0 * rows * width * 4 * width, 4.0 * head_width * pairs),
        "longnet.ffn": Work(2.0 * rows * width * config.ffn_width * 2),
    }


def dilated_pairs(config: LongNetConfig, rows: int) -> int:
    """Return how many pairs of query and key meet in dilated attention, over all heads."""
    pairs = 0
    for segment, ratio in zip(config.segment_lengths, config.dilation_ratios, strict=True):
        length = min(segment, rows)
        per_group = -(-config.heads // ratio)
        for start in range(0, rows, length):
            here = min(length, rows - start)
            for head in range(config.heads):
                pairs += len(range(head // per_group, here, ratio)) ** 2
    return pairs


def _modality(module: object, width: int) -> Work:
    """Per case."""
    if isinstance(module, ClinicalModality):
        first = module.linear1
        return Work(2.0 * first.out_features * (first.in_features + width))
    if not isinstance(module, GeneModality):
        return Work()  # somebody's own: unknown, and small beside the trunk
    encoder = module.encoder
    memberships = encoder.networks.gene_index.numel()
    pathways, inner = encoder.networks.offsets.numel() - 1, encoder.config.width
    work = 2.0 * inner * memberships + 2.0 * pathways * inner * inner
    for block in encoder.blocks():
        work += 4.0 * inner * pathways * block.token_in.out_features
        work += 4.0 * pathways * inner * block.channel_in.out_features
    work += 2.0 * pathways * inner * width + 2.0 * encoder.config.tokens * pathways * width
    return Work(work)


def _few_rows(attention: BottleneckAttention, width: int, rows: int) -> float:
    """Projections of modal tokens to queries and back, without folding."""
    inner = attention.query.out_features
    if attention.reduce is None:
        return 4.0 * rows * inner * inner
    return 4.0 * rows * (width * inner + inner * inner)


def _injector(injector: Injector, width: int, rows: int, modal: int, cases: int) -> Work:
    inner = injector.attn.query.out_features
    keys = 4.0 * cases * modal * width * inner
    return Work(4.0 * rows * width * inner + keys, 4.0 * rows * modal * inner)


def _extractor(
    attention: BottleneckAttention, width: int, rows: int, modal: int, cases: int
) -> Work:
    inner = attention.query.out_features
    few = _few_rows(attention, width, cases * modal)
    ffn = 0.0 if attention.reduce is None else 4.0 * cases * modal * width * inner
    return Work(4.0 * rows * width * inner + few + ffn, 4.0 * rows * modal * inner)


def _self_attention(module: PromptSelfAttention, width: int, modal: int) -> Work:
    """Per case."""
    inner = module.attn.query.out_features
    keys = 4.0 * modal * width * inner
    return Work(_few_rows(module.attn, width, modal) + keys, 4.0 * modal * modal * inner)
