"""Float32 products on the CPU through the fastest library of this machine.

    product(x, W, b) = x W^T + b                 product_back(g, W) = g W

torch sends float32 products to MKL, which keeps to AVX2 on other makers' processors. The same
product is one call away in oneDNN (built into torch) and in the BLAS of numpy (views, no copies);
which one is fastest is measured (`_product_choice`). All of them compute in float32: results differ
in the last bits only. Other dtypes, and products of a few rows, go to torch.

oneDNN wants the weight in a layout of its own. A frozen weight is reordered once and the copy kept
(`PackedWeights`), which is worth 3 to 8 % of a product; a weight that changes is reordered for one
product where there are enough rows to pay for it.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from modaltune.kernels._allocator import keep_freed_memory

MEMORY_VARIABLE = "MODALTUNE_PACKED_MIB"
DEFAULT_PACKED_MIB = 1024  # both layouts of the published slide encoder are 650 MiB
# Below this, the call costs more than what a faster library saves.
MIN_ROWS = 64
# A reorder reads and writes the weight once: 1.6 ms for 9 MB, as much as 3 % of 2,048 rows save.
MIN_ROWS_TO_PACK = 2048
EVERY_ROW = slice(None)
_Key = tuple[bool, int | None, int | None]  # transposed or not, rows
_SAMPLE = 64  # values of a weight that are compared before its copy is used


def has_onednn() -> bool:
    """Return whether this torch can be asked for a oneDNN product."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(hasattr(ops, name) for name in names)


@dataclass(frozen=True)
class _Packed:
    """A reordered copy and what tells whether its weight is still the same."""

    version: int
    address: int
    sample: Tensor
    copy: Tensor

    def is_of(self, weight: Tensor) -> bool:
        return (
            self.version == weight._version
            and self.address == weight.data_ptr()
            # Writes through `.data` do not count as a version.
            and torch.equal(self.sample, _sample(weight))
        )


def _sample(weight: Tensor) -> Tensor:
    return weight.view(-1)[:: max(1, weight.numel() // _SAMPLE)]


class PackedWeights:
    """Copies of frozen weights in oneDNN's layout: each lives no longer than its weight.

    Keyed by the tensor object, so modules are copied and pickled without them. A copy is made
    again when the weight has moved or changed (an in-place operation, `load_state_dict`, or a
    write through `.data` that touches one of 64 values spread over it). At most
    `MODALTUNE_PACKED_MIB` (1,024) MiB are kept; what does not fit is reordered for each product.
    """

    def __init__(self) -> None:
        self._kept: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    def get(self, weight: Tensor, *, back: bool, part: slice = EVERY_ROW) -> Tensor | None:
        """Return the copy of rows `part` of `weight` `[M, K]` (transposed for `back`), or None.

        None where it can't be known whether the weight changes, or no memory is left.
        """
        if weight.is_inference() or not weight.is_contiguous():
            return None  # inference tensors have no version
        with self._lock:
            of_weight: dict[_Key, _Packed] = self._kept.setdefault(weight, {})
            key = (back, part.start, part.stop)
            found = of_weight.get(key)
            if found is not None and found.is_of(weight):
                return found.copy
            of_weight.pop(key, None)
            rows = weight.detach()[part]
            if self._bytes() + rows.numel() * rows.element_size() > most_packed_bytes():
                return None
            made = _Packed(
                weight._version,
                weight.data_ptr(),
                _sample(weight.detach()).clone(),
                reorder(rows, back=back),
            )
            of_weight[key] = made
            return made.copy

    def _bytes(self) -> int:
        kept = (packed.copy for of_weight in self._kept.values() for packed in of_weight.values())
        return sum(copy.numel() * 4 for copy in kept)

    def bytes_kept(self) -> int:
        """Return the bytes of all copies that are alive."""
        with self._lock:
            return self._bytes()

    def clear(self) -> None:
        """Forget every copy; they are made again when they are needed."""
        with self._lock:
            self._kept = WeakIdKeyDictionary()


PACKED = PackedWeights()


def most_packed_bytes() -> int:
    """Return the most bytes of reordered copies that are kept, from the environment or by default.

    Raises:
        ValueError: The variable is no whole number of MiB.
    """
    text = os.environ.get(MEMORY_VARIABLE, str(DEFAULT_PACKED_MIB))
    if not text.isdecimal():
        raise ValueError(
            f"{MEMORY_VARIABLE} must be a whole number of MiB (0 keeps nothing), got {text!r}"
        )
    return int(text) * 2**20


def reorder(weight: Tensor, *, back: bool = False) -> Tensor:
    """Return a copy of `[M, K]` (its transpose for `back`) in oneDNN's layout."""
    weight = weight.detach()
    return torch.ops.mkldnn._reorder_linear_weight(weight.t() if back else weight)


@dataclass(frozen=True)
class _How:
    """What a product is besides its operands; see `product` and `product_back`."""

    gelu: bool
    keep: bool
    back: bool
    part: slice


def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, how: _How
) -> Tensor:
    packed = PACKED.get(weight, back=how.back, part=how.part) if how.keep else None
    rows = weight[how.part]
    if packed is None and x.shape[0] >= MIN_ROWS_TO_PACK:
        packed = reorder(rows, back=how.back)
    if packed is None:
        packed = rows.t() if how.back else rows
    run = torch.ops.mkldnn._linear_pointwise
    if add is not None:
        return run.binary(x, add, packed, bias, "add")
    return run(x, packed, bias, *(("gelu", [], "none") if how.gelu else ("none", [], "")))


def _numpy(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, how: _How) -> Tensor:
    import numpy as np

    rows = weight[how.part].numpy()
    matrix = rows if how.back else rows.T
    out = torch.empty(x.shape[0], matrix.shape[1], dtype=x.dtype)
    np.matmul(x.numpy(), matrix, out=out.numpy())
    for term in (bias, add):
        if term is not None:
            out.add_(term)
    return F.gelu(out) if how.gelu else out


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, how: _How) -> Tensor:
    rows = weight[how.part]
    out = x @ rows if how.back else F.linear(x, rows, bias)
    if add is not None:
        out = out.add_(add)
    if not how.gelu:
        return out
    # Published under mixed precision: GELU in float32, cast back.
    half = out.dtype in (torch.float16, torch.bfloat16)
    return F.gelu(out.float()).to(out.dtype) if half else F.gelu(out)


RUNNERS = {"onednn": _onednn, "numpy": _numpy, "torch": _torch}


def run_with(
    library: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    *,
    gelu: bool = False,
    keep: bool = False,
    back: bool = False,
    part: slice = EVERY_ROW,
) -> Tensor:
    """Run one product with a library by name; see `product` and `product_back`."""
    x, weight = x.detach(), weight if keep else weight.detach()
    bias = None if bias is None else bias.detach()
    with torch.no_grad():
        return RUNNERS[library](x, weight, bias, add, _How(gelu, keep, back, part))


def _library_for(x: Tensor, *others: Tensor | None) -> str:
    if x.shape[0] < MIN_ROWS:
        return "torch"
    keep_freed_memory()
    for tensor in (x, *others):
        if tensor is not None and (
            tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.is_mkldnn
        ):
            return "torch"
    from modaltune.kernels._product_choice import product_choice

    return product_choice().library


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    keep: bool = False,
    part: slice = EVERY_ROW,
) -> Tensor:
    """Return `x weight^T + bias`, without gradient; for bodies of operators on the CPU.

    Args:
        x: `[N, K]`.
        weight: `[M, K]`.
        bias: `[M]` or None; for a part of the weight its own.
        gelu: Apply GELU (the exact form) to the result.
        keep: Several products follow before the weight changes, as it is frozen or a call goes
            through blocks of rows: keep its reordered copy as long as it lives. Leave it off for
            a weight that is used once.
        part: Rows of the weight to multiply by. Give the whole weight and a part, not a view of
            it: the kept copy lives as long as the tensor object it was made for.

    Returns:
        A new `[N, M]` in the dtype of `x`.
    """
    library = _library_for(x, weight, bias)
    return run_with(library, x, weight, bias, gelu=gelu, keep=keep, part=part)


def product_back(
    grad: Tensor,
    weight: Tensor,
    add: Tensor | None = None,
    *,
    keep: bool = False,
    part: slice = EVERY_ROW,
) -> Tensor:
    """Return `grad weight`, `[N, M]` times `[M, K]`: the gradient of `x` in `product`.

    Args:
        grad: `[N, M]`.
        weight: `[M, K]`.
        add: `[N, K]` to add to the result, or None.
        keep: As in `product`.
        part: As in `product`.
    """
    library = _library_for(grad, weight, add)
    return run_with(library, grad, weight, None, add, keep=keep, back=True, part=part)
