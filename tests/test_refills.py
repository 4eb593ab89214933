"""The fault of Triton's pipelining on sm_90: found where it is, and in no shipped kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from modaltune.kernels._refills import early_refills

LOOP = """
    %a = ttg.local_alloc : () -> !ttg.memdesc<{slots}x128x64xf16, #shared>
    %b = ttg.local_alloc : () -> !ttg.memdesc<3x64x64xf16, #shared>
    %x:2 = scf.for %i = %c0 to %c768 step %c64 iter_args(%acc = %zero) -> (i32) {{
      %1 = ttg.memdesc_index %a[%i] : !ttg.memdesc<{slots}x128x64xf16> -> !ttg.memdesc<128x64xf16>
      %2 = ttg.memdesc_index %b[%i] : !ttg.memdesc<3x64x64xf16> -> !ttg.memdesc<64x64xf16>
      %3 = ttg.memdesc_trans %2 {{order = array<i32: 1, 0>}} : !ttg.memdesc<64x64xf16>
      %4 = ttng.warp_group_dot %1, %3, %acc {{isAsync = true}} : !ttg.memdesc<128x64xf16>
      %5:2 = ttng.warp_group_dot_wait %4, %1 {{pendings = {pendings} : i32}} : tensor<128x64xf32>
    }}
"""


@pytest.mark.parametrize(
    ("slots", "pendings", "found"), [(2, 1, [2]), (2, 0, []), (3, 1, []), (1, 2, [1])]
)
def test_a_product_in_flight_needs_a_slot_for_every_turn(
    slots: int, pendings: int, found: list[int]
) -> None:
    assert early_refills(LOOP.format(slots=slots, pendings=pendings), 3) == found


KERNEL = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from modaltune.kernels._refills import early_refills


@triton.jit
def product(
    x_ptr, w_ptr, out_ptr, sums_ptr, one, WITH_SUM: tl.constexpr, FROM_REGISTERS: tl.constexpr
):
    rows, cols, inner = tl.arange(0, 128), tl.arange(0, 64), tl.arange(0, 64)
    acc = tl.zeros([128, 64], tl.float32)
    total = tl.zeros([128], tl.float32)
    for first in range(0, 768, 64):
        x = tl.load(x_ptr + rows[:, None] * 768 + first + inner[None, :])
        w = tl.load(w_ptr + cols[:, None] * 768 + first + inner[None, :])
        if WITH_SUM:
            total += tl.sum(x.to(tl.float32), 1)
        if FROM_REGISTERS:
            x = x * (one > 0).to(x.dtype)
        acc = tl.dot(x, tl.trans(w), acc)
    tl.store(out_ptr + rows[:, None] * 64 + cols[None, :], acc)
    tl.store(sums_ptr + rows, total)


names = product.arg_names
kinds = dict(zip(names, ["*fp16", "*fp16", "*fp32", "*fp32", "i32", "constexpr", "constexpr"]))
for flags in ((False, False), (True, False), (True, True)):
    source = ASTSource(
        fn=product,
        signature=kinds,
        constexprs={(5,): flags[0], (6,): flags[1]},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    options = {"num_warps": 8, "num_stages": 3}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(early_refills(made.asm["ttgir"], 3))
"""


@pytest.mark.slow
def test_the_compiler_does_so_where_a_tile_is_summed_too(tmp_path: Path) -> None:
    """And not where the product takes the tile from registers, which is what our kernels do."""
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    plain, summed, registers = done.stdout.split("\n")[:3]
    assert plain == registers == "[]"
    if summed == "[]":
        pytest.skip("this Triton fills no buffer too early: the detour can go")
    assert summed == "[2]"
