"""Micro-kernels of attention on the CPU, in LLVM's vector types: their sums stay in registers.

A tile of queries lies along the lanes of three vectors. One key's coordinate, or one value's, is
broadcast and multiplied into all three:

    s_j += k_jc q_c     all c, KEYS keys at once: 3 KEYS sums in registers     w_j = 2^s_j
    o_c += v_jc w_j     all keys of a chunk, COLUMNS coordinates at once

For gradients of keys and values the coordinates lie along the lanes instead:

    g_j += w_ji r_i     all queries i of a tile, KEYS keys at once

Each broadcast is worth three multiply-adds, and no sum is loaded or stored within a pass. A pass
begins at zero and is added to what was there: thousands of terms lose no more than hundreds. Loops
that numba vectorises by itself keep sums in memory and reach two thirds of the speed.

Arrays are float32 without gaps.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import math
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic


def _vector_lanes() -> int:
    """Return how many float32 a vector of the processor holds that numba compiles for."""
    chosen = config.CPU_FEATURES  # type: ignore[attr-defined]
    features = (chosen or binding.get_host_cpu_features().flatten()).split(",")
    return 16 if "+avx512f" in features else 8 if "+avx2" in features else 4


LANES = _vector_lanes()
VECTORS = 3
TILE = VECTORS * LANES  # queries of a tile, coordinates of a group
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

    def products_with_tile(self, rows: Any, tile: Any, width: Any) -> list[list[Any]]:
        """Places that hold rows `[KEYS, width]` times a tile `[width, TILE]`."""
        products = self.sums(KEYS)
        for place in (place for row in products for place in row):
            self.b.store(_all(_FLOATS, 0.0), place)
        with cgutils.for_range(self.b, width, intp=_SIZE) as loop:
            c = loop.index
            self.add_products(
                products,
                [self.broadcast(rows, self.at((width, j), c)) for j in range(KEYS)],
                [self.load(tile, self.at((c, TILE), v * LANES)) for v in range(VECTORS)],
            )
        return products

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

    keys: `[KEYS, dim]`; queries: `[dim, TILE]`; weights: `[KEYS, TILE]`; total: `[TILE]`. dim,
    valid: int64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _Code(context, builder, signature, arguments)
        key, query, weight, sum_of_weights = (code.data(i) for i in range(4))
        width, count = code.number(4), code.number(5)
        zero = _all(_FLOATS, 0.0)
        scores = code.products_with_tile(key, query, width)
        for v in range(VECTORS):
            total_here = zero
            for j in range(KEYS):
                power = code.power_of_two(builder.load(scores[j][v]))
                is_key = builder.icmp_signed(">", count, ir.Constant(_SIZE, j))
                power = builder.select(is_key, power, zero)
                code.store(power, weight, code.at(j * TILE + v * LANES))
                total_here = builder.fadd(total_here, power)
            before = code.load(sum_of_weights, code.at(v * LANES))
            code.store(builder.fadd(before, total_here), sum_of_weights, code.at(v * LANES))
        return context.get_dummy_value()

    return types.void(keys, queries, weights, total, types.int64, types.int64), generate


@intrinsic
def add_values(_typing: Any, values, weights, out, count, dim):
    """Add to out[c] the sum over j of values[j, c] * weights[j].

    values: `[count, dim]`; weights: `[count, TILE]`; out: `[dim, TILE]`; dim a multiple of COLUMNS.
    count, dim: int64.
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
            for place, _ in places:
                builder.store(_all(_FLOATS, 0.0), place)
            with cgutils.for_range(builder, keys, intp=_SIZE) as inner:
                j = inner.index
                code.add_products(
                    sums,
                    [code.broadcast(value, code.at((j, width), first, i)) for i in range(COLUMNS)],
                    [code.load(weight, code.at((j, TILE), v * LANES)) for v in range(VECTORS)],
                )
            for place, index in places:
                before = code.load(target, index)
                code.store(builder.fadd(before, builder.load(place)), target, index)
        return context.get_dummy_value()

    return types.void(values, weights, out, types.int64, types.int64), generate


@intrinsic
def slope(_typing: Any, values, pulled, weights, slopes, total, dim):
    """Set slopes[j] to weights[j] * (values[j] . pulled), and add them to total.

    values: `[KEYS, dim]`; pulled: `[dim, TILE]`; weights, slopes: `[KEYS, TILE]`; total: `[TILE]`.
    dim: int64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _Code(context, builder, signature, arguments)
        value, tile, weight, target, sum_of_slopes = (code.data(i) for i in range(5))
        products = code.products_with_tile(value, tile, code.number(5))
        for v in range(VECTORS):
            total_here = _all(_FLOATS, 0.0)
            for j in range(KEYS):
                index = code.at(j * TILE + v * LANES)
                here = builder.fmul(builder.load(products[j][v]), code.load(weight, index))
                code.store(here, target, index)
                total_here = builder.fadd(total_here, here)
            before = code.load(sum_of_slopes, code.at(v * LANES))
            code.store(builder.fadd(before, total_here), sum_of_slopes, code.at(v * LANES))
        return context.get_dummy_value()

    return types.void(values, pulled, weights, slopes, total, types.int64), generate


@intrinsic
def add_rows(_typing: Any, weights, rows, out, width):
    """Add to out[j] the sum over i of weights[j, i] * rows[i].

    weights: `[KEYS, TILE]`; rows: `[TILE, width]`; out: `[KEYS, width]`; width a multiple of TILE.
    width: int64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _Code(context, builder, signature, arguments)
        weight, row, target = (code.data(i) for i in range(3))
        wide = code.number(3)
        sums = code.sums(KEYS)
        groups = builder.sdiv(wide, ir.Constant(_SIZE, TILE))
        with cgutils.for_range(builder, groups, intp=_SIZE) as outer:
            first = code.at((outer.index, TILE))
            places = [
                (place, code.at((wide, j), first, v * LANES))
                for j, of_key in enumerate(sums)
                for v, place in enumerate(of_key)
            ]
            for place, _ in places:
                builder.store(_all(_FLOATS, 0.0), place)
            with cgutils.for_range(builder, ir.Constant(_SIZE, TILE), intp=_SIZE) as inner:
                i = inner.index
                code.add_products(
                    sums,
                    [code.broadcast(weight, code.at(i, j * TILE)) for j in range(KEYS)],
                    [code.load(row, code.at((i, wide), first, v * LANES)) for v in range(VECTORS)],
                )
            for place, index in places:
                before = code.load(target, index)
                code.store(builder.fadd(before, builder.load(place)), target, index)
        return context.get_dummy_value()

    return types.void(weights, rows, out, types.int64), generate
