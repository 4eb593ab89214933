"""Adapter modules alone: folding, gates, masks, initial weights. Numbers: tests/test_model.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from modaltune.adapter import (
    AdapterConfig,
    BottleneckAttention,
    Extractor,
    Injector,
    ModalAdapter,
    PromptSelfAttention,
)
from modaltune.errors import InputError
from modaltune.slide_encoders.longnet import LongNet, LongNetConfig
from modaltune.slide_encoders.protocol import SlideTokens

D, HEADS, G = 16, 2, 5


def shake(module: Any, seed: int = 0) -> Any:
    """Give a module weights that are nowhere degenerate, in float64."""
    torch.manual_seed(seed)
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module.double().eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def packed(*tiles: int) -> SlideTokens:
    rows = [1 + n for n in tiles]
    return SlideTokens(draw(sum(rows), D), torch.tensor([0, *rows]).cumsum(0))


@pytest.mark.parametrize("bottleneck", [0.25, 1.0, None])
def test_folded_maps_equal_the_maps_one_after_the_other(bottleneck: float | None) -> None:
    attn = shake(BottleneckAttention(D, HEADS, bottleneck))
    x = draw(7, D)
    weight, bias = attn.query_map()
    torch.testing.assert_close(x @ weight.T + bias, attn.project_queries(x), rtol=0, atol=1e-12)
    inner = draw(7, weight.shape[0])
    weight, bias = attn.output_map()
    torch.testing.assert_close(
        inner @ weight.T + bias, attn.project_output(inner), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("bottleneck", [0.25, None])
def test_initial_weights_are_the_published_draw(bottleneck: float | None) -> None:
    width = 96
    inner = width if bottleneck is None else 24
    attn = BottleneckAttention(width, 4, bottleneck)
    # METHOD 7: Xavier-uniform on every matrix as published; query, key and value are one matrix
    # [3D, D] there when there is no bottleneck.
    fans = dict.fromkeys(("key", "value"), inner + width) | {"query": 2 * inner}
    if bottleneck is None:
        fans = dict.fromkeys(("query", "key", "value"), 4 * width)
    else:
        fans |= {"reduce": inner + width, "expand": inner + width}
    fans["out"] = 2 * inner
    for name, fan in fans.items():
        layer = getattr(attn, name)
        bound = math.sqrt(6 / fan)
        largest = float(layer.weight.detach().abs().max())
        assert 0.97 * bound < largest <= bound, name
        assert float(layer.bias.detach().abs().max()) == 0, name


def test_a_new_adapter_leaves_the_slide_stream_alone() -> None:
    injector = Injector(D, HEADS, 0.25).double()
    assert float(injector.gamma.detach().abs().max()) == 0
    tokens = packed(6, 3)
    assert torch.equal(injector(tokens, draw(2, G, D), draw(G, D), None).x, tokens.x)


def test_the_injector_never_touches_cls_rows() -> None:
    injector, tokens = shake(Injector(D, HEADS, 0.25)), packed(6, 3)
    out = injector(tokens, draw(2, G, D), draw(G, D), None).x
    assert torch.equal(out[[0, 7]], tokens.x[[0, 7]])
    assert bool((out[tokens.tile_rows()] != tokens.x[tokens.tile_rows()]).any(dim=1).all())


def test_masked_tokens_count_as_absent_in_the_injector() -> None:
    injector, tokens = shake(Injector(D, HEADS, 0.25)), packed(6)
    modal, positions = draw(1, G, D), draw(G, D, seed=2)
    keep = torch.tensor([True, False, True, True, False])
    poisoned = modal.clone()
    poisoned[:, ~keep] = 1e9
    masked = injector(tokens, poisoned, positions, keep[None]).x
    absent = injector(tokens, modal[:, keep], positions[keep], None).x
    torch.testing.assert_close(masked, absent, rtol=0, atol=1e-12)


def test_masked_tokens_count_as_absent_in_self_attention() -> None:
    module = shake(PromptSelfAttention(D, HEADS, None))
    modal, positions = draw(2, G, D), draw(G, D, seed=2)
    keep = torch.tensor([True, False, True, True, False])
    mask = torch.stack([keep, torch.ones(G, dtype=torch.bool)])[:, None].expand(-1, G, -1)
    out = module(modal, positions, mask)
    own = module(modal[:1, keep], positions[keep], None)
    torch.testing.assert_close(out[:1, keep], own, rtol=0, atol=1e-12)
    whole = module(modal[1:], positions, None)
    torch.testing.assert_close(out[1:], whole, rtol=0, atol=1e-12)


def test_a_token_that_sees_nothing_keeps_its_value_and_stays_finite() -> None:
    module = shake(PromptSelfAttention(D, HEADS, 0.25))
    modal = draw(1, G, D).requires_grad_()
    mask = torch.ones(1, G, G, dtype=torch.bool)
    mask[0, 2] = False
    out = module(modal, draw(G, D, seed=2), mask)
    assert torch.equal(out[0, 2], modal[0, 2])
    out.sum().backward()
    assert modal.grad is not None
    assert bool(torch.isfinite(modal.grad).all())


def test_extractors_drop_only_the_ffn_and_only_in_training() -> None:
    extractor = shake(Extractor(D, HEADS, 0.25, drop_path_rate=0.5))
    args = draw(12, G, D), draw(G, D, seed=2), packed(*[4] * 12)
    whole = extractor(*args)
    assert torch.equal(whole, extractor(*args))
    extractor.ffn, ffn = None, extractor.ffn
    bare = extractor(*args)
    extractor.ffn = ffn
    torch.manual_seed(0)
    trained = extractor.train()(*args)
    doubled = bare + 2 * (whole - bare)
    states = [
        "dropped" if torch.allclose(t, b) else "doubled" if torch.allclose(t, d) else "neither"
        for t, b, d in zip(trained, bare, doubled, strict=True)
    ]
    assert set(states) == {"dropped", "doubled"}


def small_encoder(depth: int = 3) -> LongNet:
    config = LongNetConfig(in_features=4, width=D, depth=depth, heads=4, ffn_width=8)
    return shake(LongNet(config))


def test_cases_without_tiles_pass_only_the_self_attention() -> None:
    encoder = small_encoder()
    config = AdapterConfig(heads=HEADS, interactions=((0, 0), (1, 2)))
    adapter = shake(ModalAdapter(D, 3, config), seed=4)
    modal, positions, tokens = draw(3, G, D), draw(G, D, seed=2), packed(5, 2)
    _, out = adapter(encoder, tokens, modal, positions, with_tiles=torch.tensor([0, 2]))
    _, pair = adapter(encoder, tokens, modal[[0, 2]], positions)
    torch.testing.assert_close(out[[0, 2]], pair, rtol=0, atol=1e-12)
    only = adapter.self_attentions()[0](modal[1:2], positions, None)
    torch.testing.assert_close(out[1:2], only, rtol=0, atol=1e-12)
    _, none = adapter(encoder, None, modal, positions)
    torch.testing.assert_close(none[1:2], only, rtol=0, atol=1e-12)


def test_the_last_interaction_alone_has_extra_extractors() -> None:
    adapter = ModalAdapter(D, 3, AdapterConfig(heads=HEADS, interactions=((0, 0), (1, 2))))
    assert [len(block.extractors()) for block in adapter.interactions()] == [1, 3]
    assert len(adapter.self_attentions()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interactions": ()}, "rising block ranges"),
        ({"interactions": ((2, 1),)}, "rising block ranges"),
        ({"interactions": ((-1, 1),)}, "rising block ranges"),
        ({"interactions": ((2, 3), (0, 1))}, "rising block ranges"),
        ({"interactions": ((0, 1), (1, 2))}, "must not overlap"),
        ({"bottleneck": 0.0}, "bottleneck must lie in"),
        ({"bottleneck": 1.5}, "bottleneck must lie in"),
        ({"hedas": 3}, "hedas"),
    ],
)
def test_contradicting_shapes_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdapterConfig(**options)  # type: ignore[arg-type]


def test_shapes_that_do_not_fit_the_encoder_are_refused() -> None:
    with pytest.raises(InputError, match="interactions must lie within the encoder's 3 blocks"):
        ModalAdapter(D, 3, AdapterConfig(heads=HEADS, interactions=((0, 3),)))
    with pytest.raises(InputError, match="heads must divide the inner width 4, got 3"):
        BottleneckAttention(D, 3, 0.25)
    with pytest.raises(InputError, match="inner width 0"):
        BottleneckAttention(D, HEADS, 0.01)
