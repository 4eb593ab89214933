"""The CONCH v1.5 vision tower against formulas written out here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modaltune.engine.encoders import loading
from modaltune.engine.encoders.conch import (
    AttentionalPooler,
    ConchVisionTower,
    stretch_positions,
)
from modaltune.engine.encoders.loading import load_encoder
from modaltune.engine.encoders.registry import get_spec
from modaltune.kernels.tile_norm.api import normalize_tiles


def test_attentional_pooler_is_multi_head_attention() -> None:
    torch.manual_seed(1)
    pooler = AttentionalPooler(16, 24, heads=4, queries=2)
    nn.init.normal_(pooler.query)
    tokens = torch.randn(3, 7, 24)
    key = F.layer_norm(tokens, (24,), pooler.ln_k.weight, pooler.ln_k.bias)
    query = F.layer_norm(pooler.query, (16,), pooler.ln_q.weight, pooler.ln_q.bias)
    k_rows, v_rows = pooler.to_kv.weight[:16], pooler.to_kv.weight[16:]
    want, _ = F.multi_head_attention_forward(
        query.expand(3, 2, 16).transpose(0, 1),
        key.transpose(0, 1),
        key.transpose(0, 1),
        16,
        4,
        None,
        None,
        None,
        None,
        False,
        0.0,
        pooler.to_out.weight,
        None,
        use_separate_proj_weight=True,
        q_proj_weight=pooler.to_q.weight,
        k_proj_weight=k_rows,
        v_proj_weight=v_rows,
        need_weights=False,
    )
    torch.testing.assert_close(pooler(tokens), want.transpose(0, 1))


def test_conch_positions_are_stretched_by_dinos_rule() -> None:
    table = torch.randn(1, 197, 8)
    got = stretch_positions({"trunk.pos_embed": table, "other": table}, 785)
    assert got["trunk.pos_embed"].shape == (1, 785, 8)
    assert got["other"] is table
    assert torch.equal(got["trunk.pos_embed"][:, 0], table[:, 0])
    # A literal bicubic sample (a = -0.75) of one channel at output cell (5, 20).
    grid = table[0, 1:, 3].view(14, 14).double()

    def kernel(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    where = [(cell + 0.5) * 14 / 28.1 - 0.5 for cell in (5, 20)]
    want = 0.0
    for i in range(int(np.floor(where[0])) - 1, int(np.floor(where[0])) + 3):
        for j in range(int(np.floor(where[1])) - 1, int(np.floor(where[1])) + 3):
            value = grid[min(max(i, 0), 13), min(max(j, 0), 13)]
            want += float(value) * kernel(where[0] - i) * kernel(where[1] - j)
    assert float(got["trunk.pos_embed"][0, 1 + 5 * 28 + 20, 3]) == pytest.approx(want, abs=1e-5)
    larger = stretch_positions({"trunk.pos_embed": torch.randn(1, 785, 8)}, 785)
    assert larger["trunk.pos_embed"].shape == (1, 785, 8)
    odd = stretch_positions({"trunk.pos_embed": torch.randn(1, 12, 8)}, 785)
    assert odd["trunk.pos_embed"].shape == (1, 12, 8)


def test_conch_loads_its_published_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args: dict[str, Any] = {
        "img_size": 448,
        "patch_size": 16,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
    }
    spec = replace(
        get_spec("conch-v1.5"), model_args={**args, "init_values": 1.0, "num_classes": 0}
    )
    monkeypatch.setattr(loading, "get_spec", lambda name: spec)
    torch.manual_seed(0)
    tower = ConchVisionTower(spec.architecture, **{**spec.model_args, "img_size": 224}).eval()
    nn.init.normal_(tower.attn_pool_contrast.query)
    torch.save(tower.state_dict(), tmp_path / "pytorch_model_vision.bin")
    encoder = load_encoder("conch-v1.5", weights=tmp_path)
    tiles = np.random.default_rng(0).integers(0, 256, (1, 512, 512, 3), dtype=np.uint8)
    got = encoder.encode(tiles)
    assert got.shape == (1, 768)
    # The same weights, positions stretched by hand, run step by step.
    x = normalize_tiles(
        torch.from_numpy(tiles),
        mean=spec.mean,
        std=spec.std,
        resize_px=448,
        interpolation="bilinear",
    )
    table = stretch_positions(tower.state_dict(), 785)["trunk.pos_embed"]
    with torch.no_grad():
        patches = F.conv2d(
            x, tower.trunk.patch_embed.proj.weight, tower.trunk.patch_embed.proj.bias, stride=16
        )
        sequence = torch.cat([tower.trunk.cls_token, patches.flatten(2).transpose(1, 2)], 1) + table
        tokens = tower.trunk.norm(tower.trunk.blocks(sequence))
        want = tower.ln_contrast(tower.attn_pool_contrast(tokens)[:, 0])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
