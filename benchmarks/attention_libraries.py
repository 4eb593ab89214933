"""Fused attention of libraries, each behind one signature; absent ones say how to get them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.benchmarks.kernel_spec import NotHereError

# q, k, v `[S, m, H, d]` and the scale -> out `[S, m, H, d]` and, in float32, its log-sum-exp
# `[S, H, m]` or None.
Attend = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor | None]]


def _library(module: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotHereError(f"not installed; pip install {install}") from error


def sdpa() -> Attend:
    """PyTorch's choice of fused attention; it gives no log-sum-exp."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, None]:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2), None

    return attend


def aten_with_lse(device: torch.device, dtype: torch.dtype) -> Attend:
    """ATen's flash attention by name, with the log-sum-exp.

    Raises:
        NotHereError: Its CUDA kernel takes half precision only.
    """
    if device.type == "cuda" and dtype not in (torch.float16, torch.bfloat16):
        raise NotHereError(f"takes float16 and bfloat16 on CUDA, got {dtype}")
    name = "_scaled_dot_product_flash_attention"
    operator = getattr(torch.ops.aten, name if device.type == "cuda" else f"{name}_for_cpu")

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, lse, *_ = operator(q, k, v, scale=scale)
        return out.transpose(1, 2), lse

    return attend


def flash_attn() -> Attend:
    """FlashAttention's own package.

    Raises:
        NotHereError: The package is not installed.
    """
    library = _library("flash_attn", "flash-attn")

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, _ = library.flash_attn_func(q, k, v, softmax_scale=scale, return_attn_probs=True)
        return out, lse

    return attend


def xformers() -> Attend:
    """Memory-efficient attention of xFormers; with the log-sum-exp, forward only.

    Raises:
        NotHereError: The package is not installed.
    """
    library = _library("xformers.ops.fmha", "xformers")

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return library.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)

    return attend
