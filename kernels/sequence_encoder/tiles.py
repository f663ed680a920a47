# mypy: disable-error-code="assignment"
"""What both directions of the sequence encoder share: rows in memory, LayerNorm, attention's shares, dropout.

In every kernel

    SIZES    D, HEADS, F, LAYERS, WINDOW
    BLOCKS   BLOCK_S, BLOCK_D, BLOCK_H, BLOCK_F: places of a sequence, width, width of a head, inner units
    DROPOUT  words of Philox below its first number drop (0: dropout is off), its second scales the rest
    span     (place, end, rows, places): b·S + s of a program's places, int64 `[BS]`, where the sequence ends,
             B·S, S
    blocks   weights in the order of `SequenceEncoderBlock`, one block after another

A buffer of rows holds matrices of all B·S places one after another, so that their rows are read in vectors:
the matrix that START numbers a place precede begins at rows · START. `kept` holds, D and F as above,

    normed, entered [D], then of each block query, key, value, mixed, attended, forwarded [D], inner [F], and
    at the end what each norm multiplied by, a number a place: entered's, then of each block attended's and
    forwarded's

where normed, attended and forwarded are normalised rows before gain and bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._common import dot, pick, softmax

# Places in `blocks`.
QUERY = tl.constexpr(0)
KEY = tl.constexpr(1)
VALUE = tl.constexpr(2)
OUT = tl.constexpr(3)
ATTENTION_GAIN = tl.constexpr(4)
ATTENTION_BIAS = tl.constexpr(5)
WIDEN = tl.constexpr(6)
WIDEN_BIAS = tl.constexpr(7)
NARROW = tl.constexpr(8)
NARROW_BIAS = tl.constexpr(9)
FORWARD_GAIN = tl.constexpr(10)
FORWARD_BIAS = tl.constexpr(11)
FIELDS = tl.constexpr(12)

# Places in `kept` of a block, in units of D; the first three are those of the weights that give them.
MIXED = tl.constexpr(3)
ATTENDED = tl.constexpr(4)
FORWARDED = tl.constexpr(5)
INNER = tl.constexpr(6)


@triton.jit
def weight_of(blocks, layer, FIELD: tl.constexpr):
    """The weight FIELD of block `layer`."""
    return pick(blocks, layer, FIELD, FIELDS)


@triton.jit
def matrix_at(buffer, rows, start):
    """The matrix that `start` numbers a place precede."""
    return buffer + tl.cast(rows, tl.int64) * start


@triton.jit
def kept_matrix(kept, rows, layer, PLACE: tl.constexpr, SIZES: tl.constexpr):
    """A block's matrix in `kept`."""
    D: tl.constexpr = SIZES[0]
    F: tl.constexpr = SIZES[2]
    return matrix_at(kept, rows, layer * (INNER * D + F) + (2 + PLACE) * D)


@triton.jit
def kept_scales(kept, rows, norm, SIZES: tl.constexpr):
    """What norm 0 (entered), 2l + 1 (attended of block l) or 2l + 2 (forwarded) multiplied by, `[rows]`."""
    D: tl.constexpr = SIZES[0]
    F: tl.constexpr = SIZES[2]
    LAYERS: tl.constexpr = SIZES[3]
    return matrix_at(kept, rows, 2 * D + LAYERS * (INNER * D + F) + norm)


@triton.jit
def load_vector(vector, index, size):
    """Entries of a vector in fp32, zeros outside."""
    return tl.load(vector + index, mask=index < size, other=0.0).to(tl.float32)


@triton.jit
def affine(normed, gain, bias, index_d, D: tl.constexpr):
    """gain · normed + bias, `[BS, BD]`."""
    return normed * load_vector(gain, index_d, D)[None, :] + load_vector(bias, index_d, D)[None, :]


@triton.jit
def normalise(x, mask_d, D: tl.constexpr, EPS: tl.constexpr):
    """(x `[BS, BD]` without mean, by 1 / deviation; that factor `[BS]`); zeros outside mask_d."""
    centred = tl.where(mask_d[None, :], x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
    by = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + EPS)
    return centred * by[:, None], by


@triton.jit
def normalise_backward(grad, normed, by, gain, mask_d, D: tl.constexpr):
    """The gradient of x `[BS, BD]` from that of gain · normed + bias."""
    grad = grad * gain[None, :]
    mean = tl.sum(grad, axis=1) / D
    slope = tl.sum(grad * normed, axis=1) / D
    return tl.where(mask_d[None, :], by[:, None] * (grad - mean[:, None] - slope[:, None] * normed), 0.0)


@triton.jit
def attention_shares(q, k, seen, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """softmax(SCALE · q kᵀ) over what each place sees, `[BS, BS]`; zeros for one that sees nothing."""
    zero = tl.zeros([q.shape[0], k.shape[0]], dtype=tl.float32)
    return softmax(SCALE * dot(q, tl.trans(k), zero, PRECISION), seen)


@triton.jit
def drop(x, seed, site, place, column, DROPOUT: tl.constexpr):
    """x `[BS, BC]` where dropout keeps it, scaled, else zeros: ops/sequence_encoder.py says which.

    place is b · S + s, int64 `[BS]`; column int32 `[BC]`.
    """
    if DROPOUT[0] == 0:
        return x
    else:
        counter = column // 64 * 16 + column % 16
        low, high = place.to(tl.uint32), (place >> 32).to(tl.uint32)
        a, b, c, d = tl.philox(tl.load(seed), counter[None, :], low[:, None], site, high[:, None])
        which = (column % 64 // 16)[None, :]
        word = tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d))
        return tl.where(word >= DROPOUT[0], x * DROPOUT[1], 0.0)
