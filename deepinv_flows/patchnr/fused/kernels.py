"""
Kernels, in Triton, of half a coupling block: a network of two hidden layers and the coupling it steers, in one pass over memory.

Each program holds the weights in shared memory, and takes one tile of M patches after another. Hidden layers stay in registers:
the accumulator of one product is the left factor of the next. Biases are products too, with columns of ones, since as vectors
they would take the registers of a hidden layer. What the backward pass needs of a rectified layer are bits.

Halves are given by the numbers of their rows, so that permutations between couplings need not be carried out. The networks have K
inputs, padded from D, hidden layers of H, padded from WIDTH, and twice OUT outputs, padded from twice E.
"""

import triton
import triton.language as tl

ONES: tl.constexpr = tl.constexpr(16)  # columns of ones for a bias; no factor of a product may have fewer columns


@triton.jit(do_not_specialize_on_alignment=["kept", "moved"])
def forward_kernel(
    state, kept, moved, log_det, a_out, product_out, dead1, dead2, w1, b1, w2, b2, w3, b3, n, alpha,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr,
    M: tl.constexpr, BACK: tl.constexpr, TANH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The new moved half, and what is added to ``log_det``; if KEEP also a, moved e^s and bits of the hidden layers."""
    dtype: tl.constexpr = w2.dtype.element_ty
    first, first_bias = _transposed(w1, WIDTH, D, H, K, dtype), _bias(b1, WIDTH, H, dtype)
    second, second_bias = _transposed(w2, WIDTH, WIDTH, H, H, dtype), _bias(b2, WIDTH, H, dtype)
    scale, scale_bias = _transposed(w3, E, WIDTH, OUT, H, dtype), _bias(b3, E, OUT, dtype)
    shift, shift_bias = _transposed(w3 + E * WIDTH, E, WIDTH, OUT, H, dtype), _bias(b3 + E, E, OUT, dtype)
    ones = tl.full((M, ONES), 1.0, tl.float32).to(dtype)
    for tile in range(tl.program_id(0), tl.cdiv(n, M), tl.num_programs(0)):
        at, inside = _places(kept, tile, n, D, K, M)
        x = tl.load(state + at, inside, 0.0)
        h = tl.dot(x.to(dtype), first, tl.dot(ones, first_bias))
        h = _relu(h).to(dtype)
        if KEEP:
            _store_signs(dead1, h, tile, n, H, M)
        h = tl.dot(h, second, tl.dot(ones, second_bias))
        h = _relu(h).to(dtype)
        if KEEP:
            _store_signs(dead2, h, tile, n, H, M)
        a = tl.dot(h, scale, tl.dot(ones, scale_bias))
        t = tl.dot(h, shift, tl.dot(ones, shift_bias))
        at, inside = _places(moved, tile, n, E, OUT, M)
        m = tl.load(state + at, inside, 0.0)
        s, _ = _soft_clamp(a, alpha, TANH)
        product = (m - t if BACK else m) * tl.exp(s)
        tl.store(state + at, product if BACK else product + t, inside)
        patch = tile * M + tl.arange(0, M)
        before = tl.load(log_det + patch, patch < n, 0.0)
        tl.store(log_det + patch, before + tl.sum(s, 1), patch < n)
        if KEEP:
            at, inside = _own_places(tile, n, E, OUT, M)
            tl.store(a_out + at, a, inside)
            tl.store(product_out + at, product, inside)


@triton.jit(do_not_specialize_on_alignment=["kept", "moved"])
def backward_kernel(
    grad, kept, moved, weight, a_in, product_in, dead1, dead2, w1, w2, w3, n, alpha,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr,
    M: tl.constexpr, BACK: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """The gradient in the old halves, from that in the new halves and from what ``forward_kernel`` kept."""
    dtype: tl.constexpr = w2.dtype.element_ty
    first, second = _matrix(w1, WIDTH, D, H, K, dtype), _matrix(w2, WIDTH, WIDTH, H, H, dtype)
    scale, shift = _matrix(w3, E, WIDTH, OUT, H, dtype), _matrix(w3 + E * WIDTH, E, WIDTH, OUT, H, dtype)
    for tile in range(tl.program_id(0), tl.cdiv(n, M), tl.num_programs(0)):
        at, inside = _own_places(tile, n, E, OUT, M)
        a, product = tl.load(a_in + at, inside, 0.0), tl.load(product_in + at, inside, 0.0)
        at, inside = _places(moved, tile, n, E, OUT, M)
        g = tl.load(grad + at, inside, 0.0)
        patch = tile * M + tl.arange(0, M)
        s, slope = _soft_clamp(a, alpha, TANH)
        ga = (g * product - tl.load(weight + patch, patch < n, 0.0)[:, None]) * slope
        before = g * tl.exp(s)
        tl.store(grad + at, before, inside)
        gt = -before if BACK else g
        h = tl.dot(gt.to(dtype), shift, tl.dot(ga.to(dtype), scale))
        h = tl.dot(_masked(h, dead2, tile, n, H, M).to(dtype), second)
        h = tl.dot(_masked(h, dead1, tile, n, H, M).to(dtype), first)
        at, inside = _places(kept, tile, n, D, K, M)
        tl.store(grad + at, tl.load(grad + at, inside, 0.0) + h, inside)


@triton.jit
def _matrix(w, rows, cols, R: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr):
    """A matrix (rows, cols) as a tile (R, C)."""
    i, j = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    return tl.load(w + i * cols + j, (i < rows) & (j < cols), 0.0).to(dtype)


@triton.jit
def _transposed(w, rows, cols, R: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr):
    """The transpose of a matrix (rows, cols) as a tile (C, R)."""
    i, j = tl.arange(0, R)[None, :], tl.arange(0, C)[:, None]
    return tl.load(w + i * cols + j, (i < rows) & (j < cols), 0.0).to(dtype)


@triton.jit
def _bias(b, size, R: tl.constexpr, dtype: tl.constexpr):
    """A vector as the sum of the rows of a tile: itself, rounded, and what rounding left."""
    row, col = tl.arange(0, ONES)[:, None], tl.arange(0, R)
    value = tl.load(b + col, col < size, 0.0)
    rounded = value.to(dtype)
    rest = (value - rounded.to(tl.float32)).to(dtype)
    return tl.where(row == 0, rounded[None, :], tl.where(row == 1, rest[None, :], tl.zeros_like(rest)[None, :]))


@triton.jit
def _places(rows, tile, n, size, C: tl.constexpr, M: tl.constexpr):
    """The places, for a tile (M, C) of patches, of these rows (size,) of a matrix (., n), and which of them exist."""
    patch, col = (tile * M + tl.arange(0, M))[:, None], tl.arange(0, C)
    row = tl.load(rows + col, col < size, 0)
    return row[None, :] * n + patch, (patch < n) & (col < size)[None, :]


@triton.jit
def _own_places(tile, n, size, C: tl.constexpr, M: tl.constexpr):
    """The same for the rows of a matrix (size, n), in order."""
    patch, col = (tile * M + tl.arange(0, M))[:, None], tl.arange(0, C)[None, :]
    return col * n + patch, (patch < n) & (col < size)


@triton.jit
def _soft_clamp(a, alpha, TANH: tl.constexpr):
    """alpha f(a) and its derivative, where f is tanh or atan."""
    if TANH:
        f = 2 * tl.sigmoid(2 * a) - 1
        return alpha * f, alpha * (1 - f * f)
    return alpha * _atan(a), alpha / (1 + a * a)


@triton.jit
def _atan(x):
    """To the last bits of float32; the coefficients are those of the library SLEEF."""
    large = tl.abs(x) > 1
    u = tl.where(large, 1 / tl.abs(x), tl.abs(x))
    q = u * u
    p = 0.00282363896258175373077393 * q - 0.0159569028764963150024414
    p = (p * q + 0.0425049886107444763183594) * q - 0.0748900920152664184570312
    p = (p * q + 0.106347933411598205566406) * q - 0.142027363181114196777344
    p = (p * q + 0.199926957488059997558594) * q - 0.333331018686294555664062
    u += u * q * p
    u = tl.where(large, 1.5707963267948966 - u, u)
    return tl.where(x < 0, -u, u)


@triton.jit
def _relu(h):
    return tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_signs(words, h, tile, n, H: tl.constexpr, M: tl.constexpr):
    """Keep which entries of a hidden layer are rectified, in words whose bits lie in one thread after a product."""
    at, inside, shift = _words(tile, n, H, M)
    bits = tl.reshape((h <= 0).to(tl.int32), at.shape[0], at.shape[1], shift.shape[2], at.shape[2], 2) << shift
    tl.store(words + at, tl.sum(tl.sum(bits, 4), 2), inside)


@triton.jit
def _masked(g, words, tile, n, H: tl.constexpr, M: tl.constexpr):
    """The gradient in a hidden layer before it was rectified."""
    at, inside, shift = _words(tile, n, H, M)
    word = tl.load(words + at, inside, 0)
    dead = (tl.expand_dims(tl.expand_dims(word, 2), 4) >> shift) & 1
    return tl.where(tl.reshape(dead, M, H) != 0, 0.0, g)


@triton.jit
def _words(tile, n, H: tl.constexpr, M: tl.constexpr):
    """The places (M, G, 4) of words, which exist, and the shifts (1, 1, J, 1, 2) of their bits; H is G J 4 2."""
    G: tl.constexpr = (H + 127) // 128
    J: tl.constexpr = H // (8 * G)
    patch, group, lane = tl.arange(0, M)[:, None, None], tl.arange(0, G)[None, :, None], tl.arange(0, 4)[None, None, :]
    patch += tile * M
    bit, odd = tl.arange(0, J)[None, None, :, None, None], tl.arange(0, 2)[None, None, None, None, :]
    return (patch * G + group) * 4 + lane, patch + 0 * group + 0 * lane < n, 2 * bit + odd
