"""Compiled loops of dilated attention's backward pass on the CPU: float32, scores without a shift.

For each tile of queries i, over all keys j of its segment, with r_i = do_i 2^-lse_i:

    w_ij = 2^s_ij      c_ij = w_ij (r_i . v_j)      delta_i = sum_j c_ij / (sum_j w_ij + pads)
    dv_j += w_ij r_i      g_ij = c_ij - w_ij delta_i      dk_j += g_ij q_i      dq_i += g_ij k_j

The two `[keys, tile]` blocks of weights and slopes are all that is kept of them. See `cpu` for the
formulas, `_branch_loops` for how pieces are walked through, `_vector_code` for the products.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, type-arg, call-arg"

from __future__ import annotations

import numpy as np

from modaltune.kernels._compiled import compiled
from modaltune.kernels.dilated_attn import _branch_loops, _vector_code
from modaltune.kernels.dilated_attn._branch_loops import CHUNK, gather, longest_piece, padded
from modaltune.kernels.dilated_attn._vector_code import (
    COLUMNS,
    KEYS,
    TILE,
    add_rows,
    add_values,
    slope,
    weigh,
)

_ZERO, _ONE = np.float32(0), np.float32(1)
_loop = compiled(reordered=False, sources=(_vector_code.__file__, _branch_loops.__file__))


@_loop
def _load_tile(rows, first, count, factors, columns, lines):
    """Put rows from `first` on, times their factors, into columns `[W, TILE]` and lines.

    lines: `[TILE, W or more]`. What is past `count` becomes zero; what is past the width of the
    rows is zero already.
    """
    for i in range(count):
        factor = factors[i]
        for c in range(rows.shape[1]):
            value = rows[first + i, c] * factor
            columns[c, i] = value
            lines[i, c] = value
    for i in range(count, TILE):
        for c in range(rows.shape[1]):
            columns[c, i] = _ZERO
            lines[i, c] = _ZERO


@_loop
def _pull_back(q, pulled, lse, keys, values, dq, dk, dv, places, pads, scale):
    """Add the gradients of one segment and head.

    Args:
        q, pulled: `[places, d]`, queries and the gradient of the output.
        lse: `[places]`, to base 2.
        keys, values: Gathered `[rows, W]`, a multiple of KEYS rows.
        dq: `[places, d]`, added to; untouched if it has no rows.
        dk, dv: `[rows, V]` sums of this segment and head, or without rows.
        places: Rows of keys and values that are keys.
        pads: Zero keys, whose weight is 1.
        scale: Of scores to base 2.
    """
    rows, width = keys.shape
    wide = (width + TILE - 1) // TILE * TILE
    queries, out_grads = np.zeros((width, TILE), q.dtype), np.zeros((width, TILE), q.dtype)
    query_rows, grad_rows = np.zeros((TILE, wide), q.dtype), np.zeros((TILE, wide), q.dtype)
    weights, slopes = np.empty((rows, TILE), q.dtype), np.empty((rows, TILE), q.dtype)
    total, delta = np.empty(TILE, q.dtype), np.empty(TILE, q.dtype)
    factors, out = np.empty(TILE, q.dtype), np.empty((width, TILE), q.dtype)
    for first in range(0, places, TILE):
        count = min(TILE, places - first)
        factors[:] = scale
        _load_tile(q, first, count, factors, queries, query_rows)
        for i in range(count):
            factors[i] = np.float32(2.0) ** -lse[first + i]
        _load_tile(pulled, first, count, factors, out_grads, grad_rows)
        total[:], delta[:], out[:] = np.float32(pads), _ZERO, _ZERO
        for j in range(0, rows, KEYS):
            weigh(keys[j:], queries, weights[j:], total, width, places - j)
            slope(values[j:], out_grads, weights[j:], slopes[j:], delta, width)
        for i in range(TILE):
            delta[i] /= total[i] if total[i] != _ZERO else _ONE
        for start in range(0, rows, CHUNK):
            here = min(CHUNK, rows - start)
            for j in range(start, start + here):
                for i in range(TILE):
                    slopes[j, i] -= weights[j, i] * delta[i]
            if len(dq):
                add_values(keys[start:], slopes[start:], out, here, width)
            for j in range(start, start + here, KEYS):
                if len(dk):
                    add_rows(slopes[j:], query_rows, dk[j:], wide)
                if len(dv):
                    add_rows(weights[j:], grad_rows, dv[j:], wide)
        if len(dq):
            for i in range(count):
                for c in range(q.shape[1]):
                    # The slopes are of scores to base e, the queries' scale is to base 2.
                    dq[first + i, c] += out[c, i] * scale * np.float32(np.log(2.0))


@_loop
def pull_back_pieces(q, k, v, pulled, lse, dq, dk, dv, pieces, scale):
    """Add the gradients of pieces to those of dq, dk and dv `[L, h, d]` that have rows.

    Args:
        q, k, v, pulled: float32 `[L, h, d]`, any strides: inputs and the gradient of the output.
        lse: float32 `[L, h]`, of the forward pass, to base 2.
        dq, dk, dv: What is added to; `[0, h, d]` where not wanted.
        pieces: As in `_branch_loops.attend_pieces`.
        scale: float32, of scores to base 2. No score may exceed 126, of either sign.
    """
    dim = q.shape[2]
    width = padded(dim, COLUMNS)
    longest, wide = padded(longest_piece(pieces), KEYS), padded(width, TILE)
    all_keys, all_values = np.empty((longest, width), q.dtype), np.empty((longest, width), q.dtype)
    of_keys = np.empty((longest if len(dk) else 0, wide), q.dtype)
    of_values = np.empty((longest if len(dv) else 0, wide), q.dtype)
    per_score = np.float32(np.log(2.0))
    for piece in pieces:
        start, segments, length, ratio, group, head, heads, pads = piece
        places = (length - group + ratio - 1) // ratio
        rows = padded(places, KEYS)
        keys, values = all_keys[:rows], all_values[:rows]
        key_sums, value_sums = of_keys[:rows], of_values[:rows]
        for s in range(segments):
            first, end = start + s * length + group, start + (s + 1) * length
            for h in range(head, heads):
                gather(k[first:end:ratio, h], keys)
                gather(v[first:end:ratio, h], values)
                key_sums[:], value_sums[:] = _ZERO, _ZERO
                _pull_back(
                    q[first:end:ratio, h],
                    pulled[first:end:ratio, h],
                    lse[first:end:ratio, h],
                    keys,
                    values,
                    dq[first:end:ratio, h],
                    key_sums,
                    value_sums,
                    places,
                    pads,
                    scale,
                )
                if len(dk):
                    _add_rows_of(key_sums, dk[first:end:ratio, h], per_score)
                if len(dv):
                    _add_rows_of(value_sums, dv[first:end:ratio, h], _ONE)


@_loop
def _add_rows_of(sums, target, factor):
    """Add `factor` times the first rows and columns of `sums` to target `[places, d]`."""
    for i in range(target.shape[0]):
        for c in range(target.shape[1]):
            target[i, c] += sums[i, c] * factor
