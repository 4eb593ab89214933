"""The exact count of useful FLOPs, against torch's own counter and against loops."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from modaltune.adapter import AdapterConfig
from modaltune.config import ModalTuneConfig
from modaltune.errors import InputError
from modaltune.modalities import GeneConfig
from modaltune.model_flops import Work, count_flops, dilated_pairs, layer_flops
from modaltune.published_size import published_size_model, random_cases
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.slide_encoders.titan import TitanConfig

# One branch of dilation 1 and one segment: no zero padding, so that a counter sees useful work.
TRUNK = LongNetConfig(
    in_features=24,
    width=48,
    depth=3,
    heads=4,
    ffn_width=64,
    segment_lengths=(1024,),
    dilation_ratios=(1,),
)
GENES = GeneConfig(width=16, depth=2, tokens=6)


def small(**changes: object) -> ModalTuneConfig:
    adapter = AdapterConfig(heads=4, interactions=((1, 1), (2, 2)))
    return ModalTuneConfig(
        **{"slide_encoder": TRUNK, "adapter": adapter, "genes": GENES, **changes}  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("changes", "cases"),
    [({}, 1), ({"clinical_features": 5}, 2), ({"token_agg": "cat", "tasks": ("one", "two")}, 1)],
)
def test_forward_is_what_torch_counts(changes: dict[str, object], cases: int) -> None:
    model = published_size_model(small(**changes)).eval()
    model.set_impl("reference")
    batch = random_cases(model, tiles=9, cases=cases)
    tasks = len(model.config.tasks)
    # With gradients on, every task passes on its own: without them some work is shared.
    with FlopCounterMode(display=False) as counter:
        model(batch)
    found = count_flops(model, [9] * cases, tasks=tasks)
    # What torch counts beside it: folding the projections (once per injector and task), and the
    # one-hot of each task prompt times its weights.
    width, inner = 48, 12
    folding = 2 * 2 * width * inner * inner
    prompts = 2 * tasks * width
    beside = tasks * (2 * folding + prompts)
    total = sum(work.total for work in found.values())
    assert counter.get_total_flops() - total == pytest.approx(beside, abs=beside)
    assert total > 10 * beside


def test_pairs_of_dilated_attention_by_a_loop() -> None:
    config = LongNetConfig(
        width=48, heads=6, segment_lengths=(8, 16, 32), dilation_ratios=(1, 2, 4)
    )
    for rows in (1, 7, 8, 9, 33, 50):
        pairs = 0
        for segment, ratio in ((8, 1), (16, 2), (32, 4)):
            for head in range(6):
                group = head // -(-6 // ratio)
                seen = [i for i in range(rows) if i % min(segment, rows) % ratio == group]
                for i in seen:
                    pairs += sum(i // min(segment, rows) == j // min(segment, rows) for j in seen)
        assert dilated_pairs(config, rows) == pairs


def test_the_published_layer_at_25000_tiles() -> None:
    """721 GFLOP with the zero padding of segments, 367 of it attention; useful is 26 less."""
    config = LongNetConfig()
    layer = layer_flops(config, [25_000])
    padded = 0
    for segment, ratio in zip(config.segment_lengths, config.dilation_ratios, strict=True):
        length = min(segment, 25_001)
        padded += -(-25_001 // length) * 16 * (-(-length // ratio)) ** 2
    beyond = 4.0 * 48 * padded - layer["longnet.attention"].attention
    assert 4.0 * 48 * padded == pytest.approx(367e9, rel=0.001)
    assert beyond == pytest.approx(26e9, rel=0.01)
    assert sum(work.total for work in layer.values()) + beyond == pytest.approx(721e9, rel=0.001)


def test_training_counts_gradients_where_they_flow() -> None:
    model = published_size_model(small())
    forward = count_flops(model, [9])
    both = count_flops(model, [9], training=True)
    assert both["injector"].total == 3 * forward["injector"].total
    assert both["embed"] == forward["embed"]  # frozen, and its input needs no gradient
    one = layer_flops(TRUNK, [9])["longnet.ffn"].products
    # Block 0 stands before the first injector and runs once; blocks 1 and 2 for each of 3 tasks.
    assert forward["longnet.ffn"].products == one * (1 + 2 * 3)
    assert both["longnet.ffn"].products == one * (1 + 2 * 2 * 3)


def test_cases_add_up_and_empty_ones_skip_the_trunk() -> None:
    model = published_size_model(small())
    together = count_flops(model, [9, 0, 4])
    alone = [count_flops(model, [count]) for count in (9, 0, 4)]
    for stage, work in together.items():
        parts = [each.get(stage, Work()) for each in alone]
        assert work.total == pytest.approx(sum(part.total for part in parts))
    assert alone[1]["longnet.ffn"].total == 0


def test_other_encoders_are_refused() -> None:
    config = ModalTuneConfig(
        slide_encoder=TitanConfig(depth=1, width=48, heads=4),
        adapter=AdapterConfig(heads=4, interactions=((0, 0),)),
        genes=None,
    )
    with pytest.raises(InputError, match="counted for a LongNet, got TitanEncoder"):
        count_flops(published_size_model(config), [9])
