"""Attention of a small inner width between wide streams, with its projections folded."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modaltune.errors import InputError

Map = tuple[Tensor, Tensor]


def _linear(out_features: int, in_features: int, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class FoldedMaps:
    """Products of weights, kept while the weights stay as they are.

    Only without gradients: otherwise every call folds anew, inside the graph. A weight counts as
    changed when its storage, dtype or version counter does, which covers optimisers,
    `load_state_dict`, `.to()` and every in-place operation except those through `.data`; changing
    the mode of the module (`train()`, `eval()`) forgets everything, too.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], tuple[list[Tensor], list[int], Map]] = {}

    def get(self, name: str, sources: list[Tensor], fold: Callable[[], Map]) -> Map:
        """Return what `fold` makes of the sources, from memory where they have not changed."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return fold()
        if any(t.is_inference() for t in sources):
            return fold()  # such tensors have no version
        versions = [t._version for t in sources]
        device, dtype = sources[0].device.type, sources[0].dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        found = self._kept.get((name, dtype))
        if found is not None:
            seen, counted, folded = found
            if counted == versions and all(map(_same_place, seen, sources)):
                return folded
        with torch.inference_mode(False), torch.no_grad():
            folded = fold()  # with a version, so that copies in other layouts may be kept, too
        # The sources are held, so that their memory is not given to others meanwhile.
        self._kept[name, dtype] = ([t.detach() for t in sources], versions, folded)
        return folded

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


def _same_place(kept: Tensor, now: Tensor) -> bool:
    return kept.data_ptr() == now.data_ptr() and kept.dtype == now.dtype


class BottleneckAttention(nn.Module):
    """Multi-head attention of inner width E between streams of width D.

    Queries go D -> E -> E, keys and values D -> E, the result E -> E -> D. Two linear maps in a row
    are folded into one wherever they meet tiles: exact, and a quarter of the work. Without a
    bottleneck E = D and the outer maps (`reduce`, `expand`) are absent.
    """

    def __init__(self, width: int, heads: int, bottleneck: float | None) -> None:
        super().__init__()
        inner = width if bottleneck is None else int(width * bottleneck)
        if inner < 1 or inner % heads:
            raise InputError(
                f"adapter heads must divide the inner width {inner}, got {heads}; change heads or "
                "the bottleneck"
            )
        self.heads = heads
        self.reduce = None if bottleneck is None else _linear(inner, width)
        self.expand = None if bottleneck is None else _linear(width, inner)
        # Without a bottleneck the published three are one matrix [3D, D] when drawn: its Xavier
        # bound, sqrt(6 / 4D), is smaller than that of a [D, D] by sqrt(1/2).
        gain = math.sqrt(0.5) if bottleneck is None else 1.0
        self.query = _linear(inner, inner, gain)
        self.key = _linear(inner, width, gain)
        self.value = _linear(inner, width, gain)
        self.out = _linear(inner, inner)
        self._folded = FoldedMaps()

    def train(self, mode: bool = True) -> BottleneckAttention:
        """Set the mode; what was folded before is forgotten."""
        self._folded.clear()
        super().train(mode)
        return self

    def query_map(self) -> Map:
        """Return the folded query projection: weight `[E, D]` and bias `[E]`."""
        if self.reduce is None:
            return self.query.weight, self.query.bias
        return self._fold("query", self.query, self.reduce)

    def output_map(self) -> Map:
        """Return the folded output projection: weight `[D, E]` and bias `[D]`."""
        if self.expand is None:
            return self.out.weight, self.out.bias
        return self._fold("output", self.expand, self.out)

    def _fold(self, name: str, outer: nn.Linear, inner: nn.Linear) -> Map:
        def fold() -> Map:
            bias = F.linear(inner.bias, outer.weight, outer.bias)
            return outer.weight @ inner.weight, bias

        sources = [outer.weight, outer.bias, inner.weight, inner.bias]
        return self._folded.get(name, sources, fold)

    def kv_map(self) -> Map:
        """Return the key projection over the value projection: weight `[2E, D]`, bias `[2E]`."""
        key, value = self.key, self.value

        def fold() -> Map:
            return torch.cat([key.weight, value.weight]), torch.cat([key.bias, value.bias])

        return self._folded.get("kv", [key.weight, value.weight, key.bias, value.bias], fold)

    def project_queries(self, x: Tensor) -> Tensor:
        """Project `[..., D]` to queries `[..., E]` without folding (few rows)."""
        return self.query(x if self.reduce is None else self.reduce(x))

    def project_output(self, x: Tensor) -> Tensor:
        """Project attended values `[..., E]` to `[..., D]` without folding (few rows)."""
        x = self.out(x)
        return x if self.expand is None else self.expand(x)
