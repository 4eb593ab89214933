"""Compiled loops of dilated attention's forward pass on the CPU: float32, scores without a shift.

    w_ij = 2^(scale log2(e) q_i . k_j)      acc_i += sum_j w_ij v_j      total_i += sum_j w_ij

Rows of queries lie along the vector lanes: both products are then sums of a few scaled rows,

    s_j += sum_c k_jc q_c         (q_c: lane i holds coordinate c of query i)
    o_c += sum_j v_jc w_j

24 and 16 multiply-adds per pass over the lanes, with the coefficients in registers; weights never
leave the innermost cache. One call does all pieces of a task: no call is made per piece, and no
other thread waits for Python's lock.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, type-arg, call-arg"

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from modaltune.kernels._compiled import compiled

KEYS = 8  # keys at a time
_LANES = 64  # lanes come in blocks of this many; their number must be known when compiled
# Taylor coefficients of 2^f; f within half a unit of zero: the rest is below 1e-8.
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (
    np.float32(math.log(2) ** i / math.factorial(i)) for i in range(1, 8)
)
_ONE, _ZERO = np.float32(1), np.float32(0)
# Truncation after adding rounds to the nearest whole number, for scores above -256.
_SHIFT, _SHIFTED = np.float32(256.5), np.int32(256)
_EXPONENT_BIAS, _MANTISSA_BITS = np.int32(127), np.int32(23)


@intrinsic
def _from_bits(_context: Any, bits: Any) -> Any:
    """The float32 of the bits of an int32."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@compiled(reordered=False)
def _add_scores(keys, queries, scores, blocks):
    """Set scores[j] to the sum over c of keys[j, c] * queries[c]."""
    lanes = _LANES * len(blocks)
    dim = queries.shape[0]
    whole = dim // 6 * 6
    if whole == 0:
        scores[:] = _ZERO
    for j in range(0, KEYS, 4):
        k0, k1, k2, k3 = keys[j], keys[j + 1], keys[j + 2], keys[j + 3]
        s0, s1, s2, s3 = scores[j], scores[j + 1], scores[j + 2], scores[j + 3]
        for c in range(0, whole, 6):
            a0, a1, a2, a3, a4, a5 = k0[c], k0[c + 1], k0[c + 2], k0[c + 3], k0[c + 4], k0[c + 5]
            b0, b1, b2, b3, b4, b5 = k1[c], k1[c + 1], k1[c + 2], k1[c + 3], k1[c + 4], k1[c + 5]
            c0, c1, c2, c3, c4, c5 = k2[c], k2[c + 1], k2[c + 2], k2[c + 3], k2[c + 4], k2[c + 5]
            d0, d1, d2, d3, d4, d5 = k3[c], k3[c + 1], k3[c + 2], k3[c + 3], k3[c + 4], k3[c + 5]
            q0, q1, q2 = queries[c], queries[c + 1], queries[c + 2]
            q3, q4, q5 = queries[c + 3], queries[c + 4], queries[c + 5]
            if c == 0:
                for i in range(lanes):
                    x0, x1, x2, x3, x4, x5 = q0[i], q1[i], q2[i], q3[i], q4[i], q5[i]
                    s0[i] = a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3 + a4 * x4 + a5 * x5
                    s1[i] = b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3 + b4 * x4 + b5 * x5
                    s2[i] = c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3 + c4 * x4 + c5 * x5
                    s3[i] = d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3 + d4 * x4 + d5 * x5
            else:
                for i in range(lanes):
                    x0, x1, x2, x3, x4, x5 = q0[i], q1[i], q2[i], q3[i], q4[i], q5[i]
                    s0[i] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3 + a4 * x4 + a5 * x5
                    s1[i] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3 + b4 * x4 + b5 * x5
                    s2[i] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3 + c4 * x4 + c5 * x5
                    s3[i] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3 + d4 * x4 + d5 * x5
        for c in range(whole, dim):
            a0, b0, c0, d0, q0 = k0[c], k1[c], k2[c], k3[c], queries[c]
            for i in range(lanes):
                x0 = q0[i]
                s0[i] += a0 * x0
                s1[i] += b0 * x0
                s2[i] += c0 * x0
                s3[i] += d0 * x0


@compiled(reordered=False)
def _exponentiate(scores, total, keys, blocks):
    """Set scores of the first keys to 2^scores, to two units in the last place; add to total."""
    lanes = _LANES * len(blocks)
    for j in range(keys):
        row = scores[j]
        for i in range(lanes):
            score = row[i]
            power = np.int32(score + _SHIFT) - _SHIFTED
            f = score - np.float32(power)
            p = (((((_C7 * f + _C6) * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1
            weight = (p * f + _ONE) * _from_bits(
                np.int32((power + _EXPONENT_BIAS) << _MANTISSA_BITS)
            )
            row[i] = weight
            total[i] += weight


@compiled(reordered=False)
def _add_values(values, weights, out, blocks):
    """Add to out[c] the sum over j of values[j, c] * weights[j]."""
    lanes = _LANES * len(blocks)
    for j in range(0, KEYS, 4):
        w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        v0, v1, v2, v3 = values[j], values[j + 1], values[j + 2], values[j + 3]
        for c in range(0, out.shape[0], 4):
            a0, a1, a2, a3 = v0[c], v1[c], v2[c], v3[c]
            b0, b1, b2, b3 = v0[c + 1], v1[c + 1], v2[c + 1], v3[c + 1]
            c0, c1, c2, c3 = v0[c + 2], v1[c + 2], v2[c + 2], v3[c + 2]
            d0, d1, d2, d3 = v0[c + 3], v1[c + 3], v2[c + 3], v3[c + 3]
            o0, o1, o2, o3 = out[c], out[c + 1], out[c + 2], out[c + 3]
            for i in range(lanes):
                x0, x1, x2, x3 = w0[i], w1[i], w2[i], w3[i]
                o0[i] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                o1[i] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
                o2[i] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
                o3[i] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3


@compiled(reordered=False)
def _last_keys(rows):
    """Return the rows past the last whole group of KEYS, with zeros behind them."""
    whole = rows.shape[0] // KEYS * KEYS
    last = np.zeros((KEYS, rows.shape[1]), rows.dtype)
    for r in range(whole, rows.shape[0]):
        for c in range(rows.shape[1]):
            last[r - whole, c] = rows[r, c]
    return last


@compiled(reordered=False)
def _attend(q, k, v, acc, total, pads, scale, blocks):
    """Add the attention of one segment and head, `[places, d]`; blocks: a tuple as long as lanes.

    pads: zero keys, whose weight is 1. The zeros behind the last keys have none.
    """
    places, dim = q.shape
    lanes = _LANES * len(blocks)
    queries, out = np.empty((dim, lanes), q.dtype), np.empty((dim, lanes), q.dtype)
    scores, weight = np.empty((KEYS, lanes), q.dtype), np.empty(lanes, q.dtype)
    whole = places // KEYS * KEYS
    last_keys, last_values = _last_keys(k), _last_keys(v)
    for first in range(0, places, lanes):
        count = min(lanes, places - first)
        queries[:] = _ZERO
        for i in range(count):
            for c in range(dim):
                queries[c, i] = q[first + i, c] * scale
        out[:] = _ZERO
        weight[:] = np.float32(pads)
        for j in range(0, whole, KEYS):
            _add_scores(k[j : j + KEYS], queries, scores, blocks)
            _exponentiate(scores, weight, KEYS, blocks)
            _add_values(v[j : j + KEYS], scores, out, blocks)
        if whole < places:
            _add_scores(last_keys, queries, scores, blocks)
            _exponentiate(scores, weight, places - whole, blocks)
            _add_values(last_values, scores, out, blocks)
        for i in range(count):
            total[first + i] += weight[i]
            for c in range(dim):
                acc[first + i, c] += out[c, i]


@compiled(reordered=False)
def attend_pieces(q, k, v, acc, total, pieces, scale):
    """Add the attention of pieces to acc `[L, h, d]` and total `[L, h]`.

    Args:
        q, k, v: float32 `[L, h, d]`, any strides; d a multiple of 4. No score may exceed 126.
        acc, total: What is added to.
        pieces: int64 `[n, 8]`: first row, segments, rows of a segment, ratio, group, first head,
            end of heads, pads.
        scale: float32, of scores to base 2.
    """
    for piece in pieces:
        start, segments, length, ratio, group, head, heads, pads = piece
        places = (length - group + ratio - 1) // ratio
        for s in range(segments):
            first, end = start + s * length + group, start + (s + 1) * length
            for h in range(head, heads):
                queries, keys = q[first:end:ratio, h], k[first:end:ratio, h]
                values, sums = v[first:end:ratio, h], acc[first:end:ratio, h]
                weights = total[first:end:ratio, h]
                # As many lanes as fit, but few where few are needed.
                if places <= _LANES:
                    _attend(queries, keys, values, sums, weights, pads, scale, (0,))
                elif places <= 2 * _LANES:
                    _attend(queries, keys, values, sums, weights, pads, scale, (0, 0))
                else:
                    _attend(queries, keys, values, sums, weights, pads, scale, (0, 0, 0, 0))
