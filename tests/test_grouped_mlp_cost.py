"""The cost model of the pathway networks and of positions, by hand and against the bars."""

from __future__ import annotations

from collections import Counter

import pytest

from modaltune.kernels.grouped_mlp import triton_kernels as pathway_kernels
from modaltune.kernels.grouped_mlp.cost import pathway_mlp_cost
from modaltune.kernels.position_embed import triton_kernels as position_kernels
from modaltune.kernels.position_embed.cost import embed_positions_cost

GPUS = {  # capability, L2 bytes, multiprocessors
    "A100": (80, 40e6, 108),
    "H100": (90, 50e6, 132),
    "B200": (100, 126e6, 148),
    "RTX 4090": (120, 72e6, 128),
}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("cases", [1, 16, 32])
@pytest.mark.parametrize(
    "how", [{}, {"itemsize": 4}, {"backward": True}, {"backward": True, "needs_x": True}], ids=str
)
def test_pathways_move_little_more_than_the_least(
    gpu: str, cases: int, how: dict[str, int]
) -> None:
    capability, l2_bytes, multiprocessors = GPUS[gpu]
    device = {"capability": capability, "multiprocessors": multiprocessors}
    found = pathway_mlp_cost(cases, l2_bytes=int(l2_bytes), **device, **how)
    assert found.least_bytes <= found.moved_bytes <= 1.3 * found.least_bytes


def test_pathways_by_hand() -> None:
    # Ten memberships of five genes in three pathways of width 16, two cases, bf16.
    sizes = (2, 3, 10, 5, 16)
    found = pathway_mlp_cost(*sizes)
    weights = 2 * (10 * 16 + 3 * 16 * 16 + 2 * 3 * 16)
    assert found.flops == 2 * 2 * (10 * 16 + 3 * 16 * 16)
    assert found.special_ops == 2 * 2 * 3 * 16
    assert found.least_bytes == weights + 2 * (2 * 5 + 2 * 3 * 16) + 8 * 10
    assert found.moved_bytes == found.least_bytes
    back = pathway_mlp_cost(*sizes, backward=True, needs_x=True)
    assert back.flops == 3 * found.flops
    assert back.least_bytes == found.least_bytes + weights + 2 * 2 * 5
    assert back.moved_bytes == back.least_bytes + 4 * (2 * 10 + 10 + 5)


def test_more_launches_move_more() -> None:
    one, two = (pathway_mlp_cost(c, backward=True) for c in (32, 33))
    assert one.moved_bytes == one.least_bytes
    assert two.moved_bytes > 2 * two.least_bytes  # the sums in float32


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1_000, 10_000, 25_000])
def test_positions_move_little_more_than_the_least(gpu: str, itemsize: int, rows: int) -> None:
    capability, l2_bytes, _ = GPUS[gpu]
    found = embed_positions_cost(
        rows, itemsize=itemsize, l2_bytes=int(l2_bytes), capability=capability
    )
    assert found.least_bytes == itemsize * 768 * (2 * rows + 2) + 16 * rows
    assert found.least_bytes < found.moved_bytes <= 1.01 * found.least_bytes


def test_every_kernel_is_compiled_in_few_configurations() -> None:
    kinds: Counter[str] = Counter()
    for capability in (80, 90, 100, 120):
        specs = pathway_kernels.compile_specs(capability)
        found = {(s.kernel, s.dtype) for s in specs}
        for kernel in ("pathway_mlp_fwd_kernel", "pathway_mlp_bwd_kernel"):
            assert {(kernel, d) for d in ("fp16", "bf16", "fp32")} <= found
        kinds["pathways"] += len(specs)
        specs = position_kernels.compile_specs(capability)
        assert {s.dtype for s in specs} == {"bf16", "fp32"}
        kinds["positions"] += len(specs)
    assert kinds["pathways"] <= 32
    assert kinds["positions"] <= 8
