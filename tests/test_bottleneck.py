"""Folded projections: kept without gradients, made again when a weight changes in any way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modaltune.bottleneck import BottleneckAttention

MAPS = ("query_map", "output_map", "kv_map")


def module() -> BottleneckAttention:
    torch.manual_seed(0)
    made = BottleneckAttention(16, 2, 0.25)
    for p in made.parameters():
        nn.init.normal_(p)
    return made.eval()


def maps(attn: BottleneckAttention) -> list[Tensor]:
    return [t for name in MAPS for t in getattr(attn, name)()]


def same_objects(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(a is b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_maps_are_kept_between_calls_without_gradients(mode: Callable[[], torch.no_grad]) -> None:
    attn = module()
    with mode():
        first = maps(attn)
        assert same_objects(maps(attn), first)
    with torch.no_grad():
        assert same_objects(maps(attn), first)
        assert not any(t.is_inference() for t in first)
    inside = maps(attn)
    assert all(t.requires_grad for t in inside), "in a graph every call folds anew"
    for kept, fresh in zip(first, inside, strict=True):
        assert torch.equal(kept, fresh)


def by_optimizer(attn: BottleneckAttention) -> None:
    with torch.enable_grad():
        sum(p.sum() for p in attn.parameters()).backward()
    torch.optim.AdamW(attn.parameters(), lr=0.1).step()


def by_load(attn: BottleneckAttention) -> None:
    attn.load_state_dict({n: t * 2 for n, t in attn.state_dict().items()})


def in_place(attn: BottleneckAttention) -> None:
    with torch.no_grad():
        for p in attn.parameters():
            p.mul_(3)


def by_new_storage(attn: BottleneckAttention) -> None:
    for p in attn.parameters():
        p.data = p.data * 2


def through_data(attn: BottleneckAttention) -> None:
    """No version counts this; the mode that is set afterwards forgets what was folded."""
    for p in attn.parameters():
        p.data.mul_(3)
    attn.eval()


def by_dtype(attn: BottleneckAttention) -> None:
    attn.double()


@pytest.mark.parametrize(
    "change", [by_optimizer, by_load, in_place, by_new_storage, through_data, by_dtype]
)
def test_a_changed_weight_is_folded_again(change: Callable[[BottleneckAttention], None]) -> None:
    attn = module()
    with torch.no_grad():
        before = maps(attn)
    change(attn)
    with torch.no_grad():
        after = maps(attn)
    fresh = maps(attn)
    for old, new, want in zip(before, after, fresh, strict=True):
        assert torch.equal(new, want)
        assert old.dtype != new.dtype or not torch.equal(old, new)


def test_a_copy_folds_its_own_weights() -> None:
    attn = module()
    with torch.no_grad():
        before = maps(attn)
        other = copy.deepcopy(attn)
        for p in other.parameters():
            p.add_(1)
        assert not any(torch.equal(a, b) for a, b in zip(maps(other), before, strict=True))
        assert same_objects(maps(attn), before)
    assert (
        set(other.state_dict()) == set(attn.state_dict()) == {n for n, _ in attn.named_parameters()}
    )


def test_autocast_folds_in_its_own_dtype() -> None:
    attn = module()
    with torch.no_grad():
        plain = attn.query_map()[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert attn.query_map()[0].dtype == torch.bfloat16
        assert attn.query_map()[0] is plain
