"""The LongNet slide encoder: grid, packing, training mode, published weights."""

from __future__ import annotations

import os
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from modaltune.errors import InputError, WeightsError
from modaltune.reference_import import encoder_rules, to_published
from modaltune.slide_encoders.longnet import LongNet, LongNetConfig, published_segments
from modaltune.slide_encoders.protocol import SlideTokens

SMALL: dict[str, Any] = {
    "in_features": 3,
    "width": 8,
    "depth": 3,
    "heads": 2,
    "ffn_width": 12,
    "grid_cells": 10,
    "segment_lengths": (4, 8),
    "dilation_ratios": (1, 2),
}


def small(**changes: Any) -> LongNet:
    torch.manual_seed(0)
    encoder = LongNet(LongNetConfig(**{**SMALL, **changes}))
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.4)
    return encoder.double().eval()


def tiles(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    where = torch.randint(0, 2560, (n, 2), generator=g)
    return torch.randn(n, 3, dtype=torch.float64, generator=g), where


def test_published_segment_lengths() -> None:
    assert published_segments() == (1024, 5792, 32768, 185363, 1048576)  # METHOD 3.3
    assert LongNetConfig().segment_lengths == published_segments()


def test_cells_are_floored_tile_corners() -> None:
    px = torch.tensor([[0, 255], [256, 511.99], [2559, 512]])
    assert small().cells(px).tolist() == [[0, 0], [1, 1], [9, 2]]


@pytest.mark.parametrize("px", [[2560.0, 0.0], [0.0, 2560.0], [-1.0, 5.0], [5.0, -0.5]])
def test_past_the_grid_is_an_error(px: list[float]) -> None:
    with pytest.raises(InputError, match=r"grid of 10 x 10 cells of 256 px, got 1 outside, the fi"):
        small().cells(torch.tensor([[0.0, 0.0], px]))


def test_the_published_index_wraps_and_ends_at_the_last_row() -> None:
    encoder = small(wrap_positions=True)
    # METHOD 3.1: index = a * G + b, so a second coordinate past the grid enters the next row.
    assert encoder.cells(torch.tensor([[256.0, 256.0 * 12]])).tolist() == [[2, 2]]
    with pytest.raises(InputError, match="1 outside"):
        encoder.cells(torch.tensor([[9 * 256.0, 256.0 * 10]]))


def test_each_case_begins_with_cls_which_has_no_position() -> None:
    encoder = small()
    x, px = tiles(5)
    tokens = encoder.embed(x, px, torch.tensor([0, 2, 5]))
    assert tokens.offsets.tolist() == [0, 3, 7]
    assert tokens.tile_counts().tolist() == [2, 3]
    assert torch.equal(tokens.x[[0, 3]], encoder.cls_token.expand(2, -1))
    assert torch.equal(encoder.pool(tokens), tokens.x[[0, 3]])
    plain = encoder.patch_embed(x)
    moved = tokens.x[tokens.tile_rows()] - plain
    w = [1.0, 10000**-0.5]  # D = 8: two frequencies; the second coordinate comes first
    for row, (a, b) in zip(moved, px.tolist(), strict=True):
        want = [
            getattr(torch.tensor(c // 256 * f, dtype=torch.float64), fn)()
            for c in (b, a)
            for fn in ("sin", "cos")
            for f in w
        ]
        torch.testing.assert_close(row, torch.stack(want), rtol=0, atol=1e-12)


def test_packed_cases_equal_single_ones() -> None:
    encoder = small()
    x, px = tiles(24)
    bounds = [0, 1, 14, 24]
    together = encoder.blocks(encoder.embed(x, px, torch.tensor(bounds)), 0, 2).x
    alone = [
        encoder.blocks(encoder.embed(x[a:b], px[a:b], torch.tensor([0, b - a])), 0, 2).x
        for a, b in pairwise(bounds)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


def test_block_ranges_are_inclusive_and_compose() -> None:
    encoder = small()
    x, px = tiles(6)
    tokens = encoder.embed(x, px, torch.tensor([0, 6]))
    step = encoder.blocks(encoder.blocks(tokens, 0, 0), 1, 2)
    assert torch.equal(encoder.blocks(tokens, 0, 2).x, step.x)
    assert not torch.equal(encoder.blocks(tokens, 0, 1).x, step.x)


def gradient_through(encoder: LongNet, x: Tensor, bounds: Tensor) -> Tensor:
    tokens = SlideTokens(x.detach().requires_grad_(), bounds)
    out = encoder.blocks(tokens, 0, 2).x
    pulled = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    return torch.autograd.grad(out, tokens.x, pulled)[0]


def test_frozen_and_trained_layers_agree_and_only_trained_ones_have_gradients() -> None:
    encoder = small()
    x, px = tiles(13)
    tokens = encoder.embed(x, px, torch.tensor([0, 13]))
    trained = gradient_through(encoder, tokens.x, tokens.offsets)
    out = encoder.blocks(tokens, 0, 2).x
    out.sum().backward()
    assert all(p.grad is not None for p in encoder.layers.parameters())
    encoder.requires_grad_(False)
    torch.testing.assert_close(encoder.blocks(tokens, 0, 2).x, out, rtol=0, atol=1e-12)
    frozen = gradient_through(encoder, tokens.x, tokens.offsets)
    torch.testing.assert_close(frozen, trained, rtol=0, atol=1e-12)


def test_a_frozen_layer_keeps_no_wide_activation() -> None:
    encoder = small(ffn_width=80).requires_grad_(False)
    own = {p.data_ptr() for p in encoder.parameters()}
    widths: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own and t.dim() >= 2 and t.shape[0] == 14:  # 13 tiles and cls
            widths.append(t[0].numel())
        return t

    x, px = tiles(13)
    tokens = encoder.embed(x, px, torch.tensor([0, 13]))
    tokens = tokens.with_x(tokens.x.detach().requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        encoder.blocks(tokens, 0, 0)
    assert widths
    assert max(widths) <= 8


def test_dropout_and_drop_path_act_in_training_only() -> None:
    encoder = small(dropout=0.5, drop_path_rate=0.4)
    x, px = tiles(9)
    assert [layer.drop_path_p for layer in encoder.layers] == pytest.approx([0, 0.2, 0.4])
    bounds = torch.tensor([0, 9])

    def run() -> Tensor:
        return encoder.blocks(encoder.embed(x, px, bounds), 0, 2).x

    assert torch.equal(run(), run())
    embedded = encoder.embed(x, px, bounds).x
    encoder.train()
    torch.manual_seed(0)
    dropped = encoder.embed(x, px, bounds).x  # on the whole sequence, cls too
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * embedded[kept])
    assert 0.3 < float(kept.double().mean()) < 0.7
    assert not torch.equal(run(), run())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"width": 10}, "width must be a multiple of 4 and of heads"),
        ({"heads": 3}, "width must be a multiple of 4 and of heads"),
        ({"dilation_ratios": (1,)}, "equal length"),
        ({"depht": 3}, "depht"),
    ],
)
def test_contradicting_shapes_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LongNetConfig(**{**SMALL, **bad})


def published(encoder: LongNet) -> dict[str, Tensor]:
    state = to_published(encoder_rules("", encoder), encoder.state_dict())
    return {name: t.clone() for name, t in state.items()}


def test_published_weights_load_to_the_bit(tmp_path: Path) -> None:
    source = small().float()
    extra = {"decoder.weight": torch.ones(2), "pos_embed": torch.ones(1, 5, 8)}
    torch.save({"model": published(source) | extra}, tmp_path / "slide_encoder.pth")
    target = LongNet(LongNetConfig(**SMALL))
    target.load_published(tmp_path / "slide_encoder.pth")
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


def test_published_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "slide_encoder.pth"
    state = published(small().float())
    target = LongNet(LongNetConfig(**SMALL))
    before = {name: t.clone() for name, t in target.state_dict().items()}
    wrong = dict(state)
    del wrong["encoder.layers.1.ffn.fc1.bias"]
    wrong["head.weight"] = torch.ones(3)
    wrong["cls_token"] = torch.ones(1, 1, 12)
    torch.save(wrong, path)
    with pytest.raises(WeightsError) as caught:
        target.load_published(path)
    for part in (
        "missing: encoder.layers.1.ffn.fc1.bias",
        "unexpected: head.weight",
        "cls_token [1, 1, 12] instead of [1, 1, 8]",
        "slide_encoder.pth",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())


class Malicious:
    """Creates a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_weights_are_never_unpickled_as_code(tmp_path: Path) -> None:
    torch.save({"model": Malicious(tmp_path / "owned")}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "bare.pth").write_bytes(b"")
    for name in ("evil", "plain", "text", "bare", "absent"):
        with pytest.raises(WeightsError, match=rf"{name}.pth must be a torch file"):
            small().load_published(tmp_path / f"{name}.pth")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    with pytest.raises(WeightsError, match=r"tensor.pth"):
        small().load_published(tmp_path / "tensor.pth")
    assert not (tmp_path / "owned").exists()
