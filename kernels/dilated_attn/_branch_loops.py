"""Compiled loops of dilated attention's forward pass on the CPU: float32, scores without a shift.

    w_ij = 2^(scale log2(e) q_i . k_j)      acc_i += sum_j w_ij v_j      total_i += sum_j w_ij

One call does all pieces of a task: no call is made per piece, and no other thread waits for
Python's lock. The keys and values of a segment and head are gathered once, without gaps; then tile
by tile of queries goes over them in chunks whose weights stay in the innermost cache.

The two products of a tile are written in LLVM's vector types. Queries lie along the lanes of three
vectors; one key's coordinate, or one value's, is broadcast and multiplied into all three:

    s_j += k_jc q_c     all c, KEYS keys at once: 3 KEYS sums in registers     w_j = 2^s_j
    o_c += v_jc w_j     all keys of a chunk, COLUMNS coordinates at once

which is three multiply-adds for each broadcast, and no load or store of a sum within a pass. Loops
that numba vectorises by itself keep sums in memory and reach two thirds of the speed.

All of it stands in one file, whose date is what numba compares its cache with.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return, type-arg, call-arg"

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from modaltune.kernels._compiled import compiled


def _vector_lanes() -> int:
    """Return how many float32 a vector of the processor holds that numba compiles for."""
    chosen = config.CPU_FEATURES  # type: ignore[attr-defined]
    features = (chosen or binding.get_host_cpu_features().flatten()).split(",")
    return 16 if "+avx512f" in features else 8 if "+avx2" in features else 4


LANES = _vector_lanes()
VECTORS = 3
TILE = VECTORS * LANES  # queries of a tile
# Sums that stay in registers: 24 of 32, or 12 of the 16 that AVX2 has.
KEYS = 4 if LANES == 8 else 8
COLUMNS = 4

_FLOAT, _INT, _SIZE = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
# Taylor coefficients of 2^f; f within half a unit of zero: the rest is below 1e-8.
_TAYLOR = [math.log(2) ** i / math.factorial(i) for i in range(8)]
# Added to a float32 it rounds to the nearest whole number, which the low bits of the sum then hold.
_ROUNDING = 1.5 * 2**23
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23


def _all(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * LANES)


class _Code:
    """What the micro-kernels are written in: one function under construction."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self.b, self.context = builder, context
        self.given = list(zip(signature.args, arguments, strict=True))

    def data(self, position: int) -> Any:
        """The first number of an argument, an array without gaps."""
        kind, value = self.given[position]
        return self.context.make_array(kind)(self.context, self.b, value).data

    def number(self, position: int) -> Any:
        return self.given[position][1]

    def at(self, *terms: Any) -> Any:
        """The sum of indices; a pair counts as a product."""
        total = None
        for term in terms:
            factors = [self._size(f) for f in (term if isinstance(term, tuple) else (term,))]
            value = factors[0] if len(factors) == 1 else self.b.mul(*factors)
            total = value if total is None else self.b.add(total, value)
        return total

    def _size(self, value: Any) -> Any:
        return ir.Constant(_SIZE, value) if isinstance(value, int) else value

    def load(self, array: Any, index: Any) -> Any:
        """A vector; numba's arrays promise no more than the alignment of their numbers."""
        found = self.b.load(self._vector_at(array, index))
        found.align = 4
        return found

    def store(self, value: Any, array: Any, index: Any) -> None:
        self.b.store(value, self._vector_at(array, index)).align = 4

    def _vector_at(self, array: Any, index: Any) -> Any:
        return self.b.bitcast(self.b.gep(array, [index]), _FLOATS.as_pointer())

    def broadcast(self, array: Any, index: Any) -> Any:
        """One number in every lane."""
        first = ir.Constant(_INT, 0)
        none = ir.Constant(_FLOATS, ir.Undefined)
        alone = self.b.insert_element(none, self.b.load(self.b.gep(array, [index])), first)
        return self.b.shuffle_vector(alone, none, ir.Constant(_INTS, [first] * LANES))

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        name = f"llvm.fma.v{LANES}f32"
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), [x, y, z])

    def sums(self, count: int) -> list[list[Any]]:
        """Places for `count` x VECTORS vectors, which LLVM turns into registers."""
        return [
            [cgutils.alloca_once(self.b, _FLOATS) for _ in range(VECTORS)] for _ in range(count)
        ]

    def add_products(self, sums: list[list[Any]], numbers: list[Any], vectors: list[Any]) -> None:
        """Add `numbers[i]` times `vectors[v]` to `sums[i][v]`."""
        for row, x in zip(sums, numbers, strict=True):
            for place, y in zip(row, vectors, strict=True):
                self.b.store(self.multiply_add(x, y, self.b.load(place)), place)

    def power_of_two(self, score: Any) -> Any:
        """2^score to two units in the last place, for scores between -126 and 126."""
        b = self.b
        rounding = _all(_FLOATS, _ROUNDING)
        rounded = b.fadd(score, rounding)
        rest = b.fsub(score, b.fsub(rounded, rounding))
        power = _all(_FLOATS, _TAYLOR[-1])
        for coefficient in reversed(_TAYLOR[:-1]):
            power = self.multiply_add(power, rest, _all(_FLOATS, coefficient))
        bits = b.shl(b.bitcast(rounded, _INTS), _all(_INTS, _MANTISSA_BITS))
        bits = b.add(bits, _all(_INTS, _EXPONENT_BIAS << _MANTISSA_BITS))
        return b.fmul(power, b.bitcast(bits, _FLOATS))


@intrinsic
def weigh(_typing: Any, keys, queries, weights, total, dim, valid):
    """Set weights[j] to 2^(keys[j] . queries), 0 from `valid` on, and add them to total.

    keys: `[KEYS, dim]`; queries: `[dim, TILE]`; weights: `[KEYS, TILE]`; total: `[TILE]`; float32
    without gaps. dim, valid: int64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _Code(context, builder, signature, arguments)
        key, query, weight, sum_of_weights = (code.data(i) for i in range(4))
        width, count = code.number(4), code.number(5)
        zero = _all(_FLOATS, 0.0)
        scores = code.sums(KEYS)
        for place in (place for row in scores for place in row):
            builder.store(zero, place)
        with cgutils.for_range(builder, width, intp=_SIZE) as loop:
            c = loop.index
            code.add_products(
                scores,
                [code.broadcast(key, code.at((width, j), c)) for j in range(KEYS)],
                [code.load(query, code.at((c, TILE), v * LANES)) for v in range(VECTORS)],
            )
        for v in range(VECTORS):
            total_here = code.load(sum_of_weights, code.at(v * LANES))
            for j in range(KEYS):
                power = code.power_of_two(builder.load(scores[j][v]))
                is_key = builder.icmp_signed(">", count, ir.Constant(_SIZE, j))
                power = builder.select(is_key, power, zero)
                code.store(power, weight, code.at(j * TILE + v * LANES))
                total_here = builder.fadd(total_here, power)
            code.store(total_here, sum_of_weights, code.at(v * LANES))
        return context.get_dummy_value()

    return types.void(keys, queries, weights, total, types.int64, types.int64), generate


@intrinsic
def add_values(_typing: Any, values, weights, out, count, dim):
    """Add to out[c] the sum over j of values[j, c] * weights[j].

    values: `[count, dim]`; weights: `[count, TILE]`; out: `[dim, TILE]`; float32 without gaps; dim
    a multiple of COLUMNS. count, dim: int64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _Code(context, builder, signature, arguments)
        value, weight, target = (code.data(i) for i in range(3))
        keys, width = code.number(3), code.number(4)
        sums = code.sums(COLUMNS)
        passes = builder.sdiv(width, ir.Constant(_SIZE, COLUMNS))
        with cgutils.for_range(builder, passes, intp=_SIZE) as outer:
            first = code.at((outer.index, COLUMNS))
            places = [
                (place, code.at((first, TILE), i * TILE + v * LANES))
                for i, row in enumerate(sums)
                for v, place in enumerate(row)
            ]
            for place, index in places:
                builder.store(code.load(target, index), place)
            with cgutils.for_range(builder, keys, intp=_SIZE) as inner:
                j = inner.index
                code.add_products(
                    sums,
                    [code.broadcast(value, code.at((j, width), first, i)) for i in range(COLUMNS)],
                    [code.load(weight, code.at((j, TILE), v * LANES)) for v in range(VECTORS)],
                )
            for place, index in places:
                code.store(builder.load(place), target, index)
        return context.get_dummy_value()

    return types.void(values, weights, out, types.int64, types.int64), generate


CHUNK = 64  # keys at a time, a multiple of KEYS: 12 KB of weights at 48 queries
_ZERO = np.float32(0)


@compiled(reordered=False)
def _gather(rows, packed):
    """Copy rows `[places, d]` into `[places or more, d or more]`, with zeros behind them."""
    places, dim = rows.shape
    packed[:] = _ZERO
    for i in range(places):
        for c in range(dim):
            packed[i, c] = rows[i, c]


@compiled(reordered=False)
def _attend(q, keys, values, acc, total, pads, scale):
    """Add the attention of one segment and head to acc `[places, d]` and total `[places]`.

    keys, values: gathered, a multiple of KEYS rows. pads: zero keys, whose weight is 1; the zeros
    behind the last keys have none.
    """
    places, dim = q.shape
    rows, width = keys.shape
    queries, out = np.zeros((width, TILE), q.dtype), np.empty((width, TILE), q.dtype)
    weights, sums = np.empty((CHUNK, TILE), q.dtype), np.empty(TILE, q.dtype)
    for first in range(0, places, TILE):
        count = min(TILE, places - first)
        for i in range(count):
            for c in range(dim):
                queries[c, i] = q[first + i, c] * scale
        out[:] = _ZERO
        sums[:] = np.float32(pads)
        for start in range(0, rows, CHUNK):
            here = min(CHUNK, rows - start)
            for j in range(0, here, KEYS):
                weigh(keys[start + j :], queries, weights[j:], sums, width, places - start - j)
            add_values(values[start:], weights, out, here, width)
        for i in range(count):
            total[first + i] += sums[i]
            for c in range(dim):
                acc[first + i, c] += out[c, i]


@compiled(reordered=False)
def attend_pieces(q, k, v, acc, total, pieces, scale):
    """Add the attention of pieces to acc `[L, h, d]` and total `[L, h]`.

    Args:
        q, k, v: float32 `[L, h, d]`, any strides. No score may exceed 126, of either sign.
        acc, total: What is added to.
        pieces: int64 `[n, 8]`: first row, segments, rows of a segment, ratio, group, first head,
            end of heads, pads.
        scale: float32, of scores to base 2.
    """
    width = (q.shape[2] + COLUMNS - 1) // COLUMNS * COLUMNS
    longest = 0
    for piece in pieces:
        longest = max(longest, (piece[2] - piece[4] + piece[3] - 1) // piece[3])
    longest = (longest + KEYS - 1) // KEYS * KEYS
    all_keys, all_values = np.empty((longest, width), q.dtype), np.empty((longest, width), q.dtype)
    for piece in pieces:
        start, segments, length, ratio, group, head, heads, pads = piece
        places = (length - group + ratio - 1) // ratio
        rows = (places + KEYS - 1) // KEYS * KEYS
        keys, values = all_keys[:rows], all_values[:rows]
        for s in range(segments):
            first, end = start + s * length + group, start + (s + 1) * length
            for h in range(head, heads):
                _gather(k[first:end:ratio, h], keys)
                _gather(v[first:end:ratio, h], values)
                _attend(
                    q[first:end:ratio, h],
                    keys,
                    values,
                    acc[first:end:ratio, h],
                    total[first:end:ratio, h],
                    pads,
                    scale,
                )
