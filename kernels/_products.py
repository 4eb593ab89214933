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

from modaltune.kernels import _checks  # noqa: F401  (the import guard)

MEMORY_VARIABLE = "MODALTUNE_PACKED_MIB"
DEFAULT_PACKED_MIB = 1024  # both layouts of the published slide encoder are 650 MiB
# Below this, the call costs more than what a faster library saves.
MIN_ROWS = 64
# A reorder reads and writes the weight once: 1.6 ms for 9 MB, as much as 3 % of 2,048 rows save.
MIN_ROWS_TO_PACK = 2048
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

    def get(self, weight: Tensor, *, back: bool) -> Tensor | None:
        """Return the copy of `weight` `[M, K]` (of its transpose for `back`), or None.

        None where it can't be known whether the weight changes, or no memory is left.
        """
        if weight.is_inference() or not weight.is_contiguous():
            return None  # inference tensors have no version
        with self._lock:
            of_weight: dict[bool, _Packed] = self._kept.setdefault(weight, {})
            found = of_weight.get(back)
            if found is not None and found.is_of(weight):
                return found.copy
            of_weight.pop(back, None)
            if self._bytes() + weight.numel() * weight.element_size() > most_packed_bytes():
                return None
            made = _Packed(
                weight._version,
                weight.data_ptr(),
                _sample(weight.detach()).clone(),
                reorder(weight, back=back),
            )
            of_weight[back] = made
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


def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool, keep: bool, back: bool
) -> Tensor:
    packed = PACKED.get(weight, back=back) if keep else None
    if packed is None and x.shape[0] >= MIN_ROWS_TO_PACK:
        packed = reorder(weight, back=back)
    if packed is None:
        packed = weight.detach().t() if back else weight.detach()
    activation, how = ("gelu", "none") if gelu else ("none", "")
    bias = None if bias is None else bias.detach()
    return torch.ops.mkldnn._linear_pointwise(x.detach(), packed, bias, activation, [], how)


def _numpy(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool, keep: bool, back: bool
) -> Tensor:
    import numpy as np

    del keep
    matrix = weight.detach().numpy() if back else weight.detach().numpy().T
    out = torch.empty(x.shape[0], matrix.shape[1], dtype=x.dtype)
    np.matmul(x.detach().numpy(), matrix, out=out.numpy())
    if bias is not None:
        out.add_(bias.detach())
    return F.gelu(out) if gelu else out


def _torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool, keep: bool, back: bool
) -> Tensor:
    del keep
    with torch.no_grad():
        out = x @ weight if back else F.linear(x, weight, bias)
        if not gelu:
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
    *,
    gelu: bool = False,
    keep: bool = False,
    back: bool = False,
) -> Tensor:
    """Run one product with a library by name; see `product`."""
    return RUNNERS[library](x, weight, bias, gelu=gelu, keep=keep, back=back)


def _library_for(x: Tensor, *others: Tensor | None) -> str:
    if x.shape[0] < MIN_ROWS:
        return "torch"
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
) -> Tensor:
    """Return `x weight^T + bias`, without gradient; for bodies of operators on the CPU.

    Args:
        x: `[N, K]`.
        weight: `[M, K]`.
        bias: `[M]` or None.
        gelu: Apply GELU (the exact form) to the result.
        keep: The weight is frozen: keep its reordered copy as long as it lives. Leave it off for
            weights that are trained or made for one call.

    Returns:
        A new `[N, M]` in the dtype of `x`.
    """
    return run_with(_library_for(x, weight, bias), x, weight, bias, gelu=gelu, keep=keep)


def product_back(grad: Tensor, weight: Tensor, *, keep: bool = False) -> Tensor:
    """Return `grad weight`, `[N, M]` times `[M, K]`: the gradient of `x` in `product`."""
    return run_with(_library_for(grad, weight), grad, weight, keep=keep, back=True)
