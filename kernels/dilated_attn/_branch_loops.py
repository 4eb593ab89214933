"""Compiled loops of dilated attention's forward pass on the CPU: float32, scores without a shift.

    w_ij = 2^(scale log2(e) q_i . k_j)      acc_i += sum_j w_ij v_j      total_i += sum_j w_ij

One call does all pieces of a task: no call is made per piece, and no other thread waits for
Python's lock. The keys and values of a segment and head are gathered once, without gaps; then tile
by tile of queries goes over them in chunks whose weights stay in the innermost cache
(`_vector_code`). No block of scores exists.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, type-arg, call-arg"

from __future__ import annotations

import numpy as np

from modaltune.kernels._compiled import compiled
from modaltune.kernels.dilated_attn import _vector_code
from modaltune.kernels.dilated_attn._vector_code import COLUMNS, KEYS, TILE, add_values, weigh

CHUNK = 64  # keys at a time, a multiple of KEYS: 12 KB of weights at 48 queries
_ZERO = np.float32(0)

_loop = compiled(reordered=False, sources=(_vector_code.__file__,))


@_loop
def padded(count, step):
    """Return the next multiple of `step`."""
    return (count + step - 1) // step * step


@_loop
def longest_piece(pieces):
    """Return the most places that a segment of any piece has."""
    longest = 0
    for piece in pieces:
        longest = max(longest, (piece[2] - piece[4] + piece[3] - 1) // piece[3])
    return longest


@_loop
def gather(rows, packed):
    """Copy rows `[places, d]` into `[places or more, d or more]`, with zeros behind them."""
    places, dim = rows.shape
    packed[:] = _ZERO
    for i in range(places):
        for c in range(dim):
            packed[i, c] = rows[i, c]


@_loop
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


@_loop
def attend_pieces(q, k, v, acc, total, pieces, scale):
    """Add the attention of pieces to acc `[L, h, d]` and total `[L, h]`.

    Args:
        q, k, v: float32 `[L, h, d]`, any strides. No score may exceed 126, of either sign.
        acc, total: What is added to.
        pieces: int64 `[n, 8]`: first row, segments, rows of a segment, ratio, group, first head,
            end of heads, pads.
        scale: float32, of scores to base 2.
    """
    width, longest = padded(q.shape[2], COLUMNS), padded(longest_piece(pieces), KEYS)
    all_keys, all_values = np.empty((longest, width), q.dtype), np.empty((longest, width), q.dtype)
    for piece in pieces:
        start, segments, length, ratio, group, head, heads, pads = piece
        places = (length - group + ratio - 1) // ratio
        rows = padded(places, KEYS)
        keys, values = all_keys[:rows], all_values[:rows]
        for s in range(segments):
            first, end = start + s * length + group, start + (s + 1) * length
            for h in range(head, heads):
                gather(k[first:end:ratio, h], keys)
                gather(v[first:end:ratio, h], values)
                _attend(
                    q[first:end:ratio, h],
                    keys,
                    values,
                    acc[first:end:ratio, h],
                    total[first:end:ratio, h],
                    pads,
                    scale,
                )
