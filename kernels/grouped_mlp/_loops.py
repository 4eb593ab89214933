"""Compiled loops of the pathway networks: one pathway after another, its weights read once.

Two products make up everything, over the width d of a network:

    rows:  out_r += sum_k c_rk rows_k     (eight rows at a time; out_r stays in the cache)
    dots:  out_rk = a_r . b_k             (four by four, in registers)

Layer 1 and the gradients are `rows`, layer 2 and the gradient of expression `dots`. Floating sums
may be taken in any order, but always the same one: results do not depend on threads.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, type-arg"

from __future__ import annotations

import math

import numpy as np

from modaltune.kernels._compiled import compiled
from modaltune.kernels._philox import KEY_STEPS, MULTIPLIERS, ROUNDS

CASES = 64  # cases at a time: their hidden units (64 KiB at d = 256) and W2 share a core's L2
HIDDEN = 2**17  # hidden units of as many pathways and cases stay there between the layers
_SMALLEST = np.float32(-18.0)  # e^-18 is less than half a step below 1
_PART = np.float32(1 / 32)
_ONE, _TWO, _ZERO = np.float32(1), np.float32(2), np.float32(0)
_C2, _C3, _C4, _C5, _C6, _C7, _C8 = (np.float32(1 / math.factorial(i)) for i in range(2, 9))
_MULTIPLY_A, _MULTIPLY_B = (np.uint64(m) for m in MULTIPLIERS)
_KEY_A, _KEY_B = (np.uint64(k) for k in KEY_STEPS)
_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


@compiled(reordered=True)
def _add_rows(coefficients, rows, out, n_out, n_rows):
    """Add to each out[r] the sum of coefficients[r, k] * rows[k] over the first n_rows rows."""
    whole = n_rows // 8 * 8
    for k in range(0, whole, 8):
        r0, r1, r2, r3 = rows[k], rows[k + 1], rows[k + 2], rows[k + 3]
        r4, r5, r6, r7 = rows[k + 4], rows[k + 5], rows[k + 6], rows[k + 7]
        for r in range(n_out):
            c, total = coefficients[r, k : k + 8], out[r]
            c0, c1, c2, c3, c4, c5, c6, c7 = c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]
            for j in range(total.size):
                first = c0 * r0[j] + c1 * r1[j] + c2 * r2[j] + c3 * r3[j]
                total[j] += first + (c4 * r4[j] + c5 * r5[j] + c6 * r6[j] + c7 * r7[j])
    for k in range(whole, n_rows):
        r0 = rows[k]
        for r in range(n_out):
            c0, total = coefficients[r, k], out[r]
            for j in range(total.size):
                total[j] += c0 * r0[j]


@compiled(reordered=True)
def _dots_of_four(a0, a1, a2, a3, b, k, out, r):
    """Products of four rows of a with four rows of b."""
    b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = a0.dtype.type(0)
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = a0.dtype.type(0)
    for j in range(a0.size):
        v0, v1, v2, v3 = b0[j], b1[j], b2[j], b3[j]
        u = a0[j]
        s00, s01, s02, s03 = s00 + u * v0, s01 + u * v1, s02 + u * v2, s03 + u * v3
        u = a1[j]
        s10, s11, s12, s13 = s10 + u * v0, s11 + u * v1, s12 + u * v2, s13 + u * v3
        u = a2[j]
        s20, s21, s22, s23 = s20 + u * v0, s21 + u * v1, s22 + u * v2, s23 + u * v3
        u = a3[j]
        s30, s31, s32, s33 = s30 + u * v0, s31 + u * v1, s32 + u * v2, s33 + u * v3
    out[r, k], out[r, k + 1], out[r, k + 2], out[r, k + 3] = s00, s01, s02, s03
    out[r + 1, k], out[r + 1, k + 1], out[r + 1, k + 2], out[r + 1, k + 3] = s10, s11, s12, s13
    out[r + 2, k], out[r + 2, k + 1], out[r + 2, k + 2], out[r + 2, k + 3] = s20, s21, s22, s23
    out[r + 3, k], out[r + 3, k + 1], out[r + 3, k + 2], out[r + 3, k + 3] = s30, s31, s32, s33


@compiled(reordered=True)
def _dots_of_one(row, b, n_b, out):
    """Set out[k] to row . b[k], from four places of b at once.

    One row is bound by memory: four places lie in four pages, whose first bytes are waited for
    together.
    """
    far = n_b // 4
    for k in range(far):
        b0, b1, b2, b3 = b[k], b[k + far], b[k + 2 * far], b[k + 3 * far]
        s0 = s1 = s2 = s3 = row.dtype.type(0)
        for j in range(row.size):
            u = row[j]
            s0, s1, s2, s3 = s0 + u * b0[j], s1 + u * b1[j], s2 + u * b2[j], s3 + u * b3[j]
        out[k], out[k + far], out[k + 2 * far], out[k + 3 * far] = s0, s1, s2, s3
    for k in range(4 * far, n_b):
        last, s0 = b[k], row.dtype.type(0)
        for j in range(row.size):
            s0 += row[j] * last[j]
        out[k] = s0


@compiled(reordered=True)
def _dots(a, b, out, n_a, n_b):
    """Set out[r, k] to a[r] . b[k]."""
    whole_a, whole_b = n_a // 4 * 4, n_b // 4 * 4
    for k in range(0, whole_b, 4):
        for r in range(0, whole_a, 4):
            _dots_of_four(a[r], a[r + 1], a[r + 2], a[r + 3], b, k, out, r)
    for k in range(whole_b, n_b):
        last = b[k]
        for r in range(whole_a):
            row, s0 = a[r], last.dtype.type(0)
            for j in range(row.size):
                s0 += row[j] * last[j]
            out[r, k] = s0
    for r in range(whole_a, n_a):
        _dots_of_one(a[r], b, n_b, out[r])


@compiled(reordered=True)
def _elu(values, is_single):
    """Set values to z where z > 0, to e^z - 1 elsewhere; NaN stays.

    In float32 by e^2y - 1 = e (e + 2) with e = e^y - 1, five times from y = z / 32: no branch, no
    table, and for z < 0 no doubling makes a relative error larger.
    """
    if not is_single:
        for j in range(values.size):
            if values[j] <= 0:
                values[j] = math.expm1(values[j])
        return
    for j in range(values.size):
        z = values[j]
        y = min(max(z, _SMALLEST), _ZERO) * _PART
        e = _C4 + y * (_C5 + y * (_C6 + y * (_C7 + y * _C8)))
        e = y * (_ONE + y * (_C2 + y * (_C3 + y * e)))
        e = e * (e + _TWO)
        e = e * (e + _TWO)
        e = e * (e + _TWO)
        e = e * (e + _TWO)
        e = e * (e + _TWO)
        values[j] = e if z <= _ZERO else z


@compiled(reordered=True)
def _draw(seed, unit, case, threshold, gone1, gone2):
    """Mark the units that dropout drops after the first and the second ELU of one network."""
    for j in range(gone1.size):
        c0, c1, c2, c3 = np.uint64(unit + j), np.uint64(case), np.uint64(0), np.uint64(0)
        k0, k1 = np.uint64(seed) & _MASK, np.uint64(seed) >> _HALF
        for _ in range(ROUNDS):
            b, a = c2 * _MULTIPLY_B, c0 * _MULTIPLY_A
            c0, c1 = (b >> _HALF) ^ c1 ^ k0, b & _MASK
            c2, c3 = (a >> _HALF) ^ c3 ^ k1, a & _MASK
            k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
        gone1[j] = c0 < np.uint64(threshold)
        gone2[j] = c1 < np.uint64(threshold)


@compiled(reordered=True)
def _drop(values, gone, scale, shift, dropped):
    for j in range(values.size):
        values[j] = dropped if gone[j] else values[j] * scale + shift


@compiled(reordered=True)
def _pull(grads, activations, gone, scale):
    """Turn gradients of dropped-out activations of one row into gradients before the ELU."""
    zero, one = grads.dtype.type(0), grads.dtype.type(1)
    for j in range(grads.size):
        slope = activations[j] + one if activations[j] <= 0 else one
        grads[j] = zero if gone[j] else grads[j] * (slope * scale)


@compiled(reordered=True)
def _first_layer(
    x, case, n_cases, genes, start, end, weight1, bias1, members, hidden, kept, gone1, gone2, draw
):
    """Run layer 1 of one pathway on cases case to case + n_cases - 1.

    Sets members (its genes, `[case, gene]`), hidden (first ELU), kept (hidden after dropout; may be
    the same array) and, under dropout, the units gone after each ELU.
    """
    seed, unit, threshold, scale, shift, dropped = draw
    for r in range(n_cases):
        for m in range(start, end):
            members[r, m - start] = x[case + r, genes[m]]
        hidden[r] = bias1
    _add_rows(members, weight1[start:end], hidden, n_cases, end - start)
    for r in range(n_cases):
        _elu(hidden[r], weight1.itemsize == 4)
        kept[r] = hidden[r]
        if threshold > 0:
            _draw(seed, unit, case + r, threshold, gone1[r], gone2[r])
            _drop(kept[r], gone1[r], scale, shift, dropped)


@compiled(reordered=True)
def _second_layer(kept, weight2, bias2, final, n_cases):
    """Set final to the second ELU of one pathway."""
    _dots(kept, weight2, final, n_cases, weight2.shape[0])
    for r in range(n_cases):
        final[r] += bias2
        _elu(final[r], weight2.itemsize == 4)


@compiled(reordered=True)
def _scratch(x, offsets, width, dtype):
    """Arrays for one block of cases: genes of a pathway, four of hidden units, and two of marks."""
    block = min(x.shape[0], CASES)
    members = np.empty((block, np.max(np.diff(offsets))), dtype)
    units = np.empty((4, block, width), dtype)
    return members, units, np.zeros((2, block, width), np.bool_)


@compiled(reordered=True)
def forward(
    x, genes, offsets, weight1, bias1, weight2, bias2, out, first, last, seed, threshold, affine
):
    """Run pathways first to last - 1 into out `[B, P, d]`.

    Layer by layer over as many pathways as the cache keeps hidden units of: the weights of a layer
    come in one stream.
    """
    total, width = x.shape[0], bias1.shape[1]
    scale, shift, dropped = affine
    members, units, marks = _scratch(x, offsets, width, weight1.dtype)
    final, gone1 = units[0], marks[0]
    block = min(total, CASES)
    together = max(min(HIDDEN // max(block * width, 1), last - first), 1)
    hidden = np.empty((together, block, width), weight1.dtype)
    gone2 = np.zeros((together if threshold > 0 else 1, block, width), np.bool_)
    for case in range(0, total, CASES):
        n = min(CASES, total - case)
        for some in range(first, last, together):
            end = min(some + together, last)
            for p in range(some, end):
                here = hidden[p - some]
                _first_layer(
                    x, case, n, genes, offsets[p], offsets[p + 1], weight1, bias1[p], members,
                    here, here, gone1, gone2[(p - some) % gone2.shape[0]],
                    (seed, p * width, threshold, scale, shift, dropped),
                )  # fmt: skip
            for p in range(some, end):
                _second_layer(hidden[p - some], weight2[p], bias2[p], final, n)
                for r in range(n):
                    if threshold > 0:
                        _drop(final[r], gone2[p - some, r], scale, shift, dropped)
                    out[case + r, p] = final[r]


@compiled(reordered=True)
def _add_first_layer(
    grad2, weight1, weight2, members, hidden, gone, scale, grad1,
    grad_members, grad_weight1, grad_bias1, n_cases, n_genes,
):  # fmt: skip
    """Pull gradients before the second ELU back through layer 1 of one pathway."""
    grad1[:n_cases] = 0
    _add_rows(grad2, weight2, grad1, n_cases, weight2.shape[0])
    for r in range(n_cases):
        _pull(grad1[r], hidden[r], gone[r], scale)
        if grad_bias1.size:
            grad_bias1 += grad1[r]
    if grad_weight1.size:
        _add_rows(members.T, grad1, grad_weight1, n_genes, n_cases)
    if grad_members.size:
        _dots(grad1, weight1, grad_members, n_cases, n_genes)


@compiled(reordered=True)
def backward(
    pulled, x, genes, offsets, weight1, bias1, weight2, bias2,
    grad_members, grad_weight1, grad_bias1, grad_weight2, grad_bias2,
    first, last, seed, threshold, affine,
):  # fmt: skip
    """Add gradients of pathways first to last - 1 to zeros; one without elements is not wanted.

    grad_members `[B, nnz]` is the gradient of expression per membership, not yet summed by gene;
    it is set and not added to.
    """
    total, width = x.shape[0], bias1.shape[1]
    scale, shift, dropped = affine
    needs_first = grad_members.size + grad_weight1.size + grad_bias1.size > 0
    members, units, gone = _scratch(x, offsets, width, weight1.dtype)
    hidden, kept, final, grad = units[0], units[1], units[2], units[3]
    for p in range(first, last):
        start, end = offsets[p], offsets[p + 1]
        draw = (seed, p * width, threshold, scale, shift, dropped)
        for case in range(0, total, CASES):
            n = min(CASES, total - case)
            _first_layer(
                x, case, n, genes, start, end, weight1, bias1[p], members, hidden, kept,
                gone[0], gone[1], draw,
            )  # fmt: skip
            _second_layer(kept, weight2[p], bias2[p], final, n)
            for r in range(n):
                grad[r] = pulled[case + r, p]
                _pull(grad[r], final[r], gone[1, r], scale)
                if grad_bias2.size:
                    grad_bias2[p] += grad[r]
            if grad_weight2.size:
                _add_rows(grad.T, kept, grad_weight2[p], width, n)
            if needs_first:
                _add_first_layer(
                    grad, weight1[start:end], weight2[p], members, hidden, gone[0], scale, final,
                    grad_members[case:, start:end], grad_weight1[start:end],
                    grad_bias1[p : p + 1].reshape(-1), n, end - start,
                )  # fmt: skip
