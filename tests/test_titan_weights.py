"""TITAN's weights: published names and shapes, strict loading, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modaltune.errors import WeightsError
from modaltune.slide_encoders.titan import TitanConfig, TitanEncoder

TINY_CONFIG = TitanConfig(
    heads=12, width=48, depth=3, in_features=20, mlp_ratio=2.0, pooler_heads=6, pooler_queries=5
)


def linear(name: str, outputs: int, inputs: int, layer: str = ".") -> dict[str, list[int]]:
    return {f"{name}{layer}weight": [outputs, inputs], f"{name}{layer}bias": [outputs]}


def norm(name: str) -> dict[str, list[int]]:
    return {f"{name}.weight": [768], f"{name}.bias": [768]}


def published_shapes() -> dict[str, list[int]]:
    """The list at the end of METHOD, section 5."""
    shapes = {"cls_token": [1, 1, 768], "proj": [768, 768], **norm("norm")}
    shapes |= linear("patch_embed.0", 768, 768)
    for i in range(6):
        block = f"blocks.modules_list.{i}"
        shapes |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        shapes |= linear(f"{block}.attn.qkv", 2304, 768) | linear(f"{block}.attn.proj", 768, 768)
        shapes |= linear(f"{block}.mlp.fc1", 3072, 768) | linear(f"{block}.mlp.fc2", 768, 3072)
    for pool, queries in (("attn_pool", 128), ("attn_pool_contrastive", 1)):
        shapes |= {f"{pool}.query": [queries, 768], **norm(f"{pool}.ln_q"), **norm(f"{pool}.ln_k")}
        shapes |= linear(f"{pool}.attn.in_proj", 2304, 768, layer="_")
        shapes |= linear(f"{pool}.attn.out_proj", 768, 768)
    return shapes


def test_published_names_and_shapes() -> None:
    with torch.device("meta"):
        encoder = TitanEncoder()
    state = encoder.published_state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == published_shapes()
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(48.5e6, rel=0.002)


def tiny_file(path: Path, **extra: Tensor) -> dict[str, Tensor]:
    """Write a file as TITAN's would be, with weights of a text encoder beside ours."""
    torch.manual_seed(3)
    state = {
        n: torch.randn_like(t) for n, t in TitanEncoder(TINY_CONFIG).published_state_dict().items()
    }
    state |= extra
    renamed = {f"vision_encoder.{n}": t for n, t in state.items()}
    save_file({**renamed, "text_encoder.weight": torch.ones(2), "logit_scale": torch.ones(1)}, path)
    return state


def test_weights_go_in_and_come_out_unchanged(tmp_path: Path) -> None:
    state = tiny_file(tmp_path / "model.safetensors")
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        encoder = TitanEncoder.from_safetensors(path, TINY_CONFIG)
        loaded = encoder.published_state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        assert all(p.dtype == torch.float32 and not p.is_meta for p in encoder.parameters())
    fresh = TitanEncoder(TINY_CONFIG)
    fresh.load_published(state)
    inputs = torch.randn(4, 20), torch.arange(8).view(4, 2) * 1024, torch.tensor([0, 1, 4])
    outputs = [e.pool(e.blocks(e.embed(*inputs), 0, 2)) for e in (encoder.eval(), fresh.eval())]
    assert torch.equal(*outputs)


def test_half_precision_file_loads_as_float32(tmp_path: Path) -> None:
    tiny_file(tmp_path / "w.safetensors", proj=torch.ones(48, 48, dtype=torch.float16))
    encoder = TitanEncoder.from_safetensors(tmp_path / "w.safetensors", TINY_CONFIG)
    assert encoder.proj.dtype == torch.float32


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = tiny_file(tmp_path / "model.safetensors", pos_embed=torch.ones(3), proj=torch.ones(7))
    with pytest.raises(WeightsError) as caught:
        TitanEncoder.from_safetensors(tmp_path, TINY_CONFIG)
    assert "1 unexpected: pos_embed" in str(caught.value)
    assert "1 of another shape: proj [7] instead of [48, 48]" in str(caught.value)
    state = {n: t for n, t in state.items() if n not in ("proj", "pos_embed", "norm.bias")}
    with pytest.raises(WeightsError, match=r"2 missing: .*norm\.bias"):
        TitanEncoder(TINY_CONFIG).load_published(state)
    with pytest.raises(WeightsError, match=r"of another shape: .*, \.\.\.;"):
        TitanEncoder.from_safetensors(tmp_path)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"folder with model\.safetensors, got"):
        TitanEncoder.from_safetensors(tmp_path)
    tiny_file(tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="must be a whole safetensors file"):
        TitanEncoder.from_safetensors(tmp_path / "cut.safetensors", TINY_CONFIG)
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"must hold keys vision_encoder\.\*, got none"):
        TitanEncoder.from_safetensors(tmp_path / "other.safetensors", TINY_CONFIG)
