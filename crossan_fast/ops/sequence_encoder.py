"""sequence_encoder: SASRec as IISAN has it (docs/mathematics.md), over a batch of left-padded sequences.

    x = drop(LN(item + position)), then for each block
    x ← LN(x + drop(W_out A(x))),      A(x) = drop(softmax(q kᵀ / √d_head)) v a head, over real places so far
    x ← LN(x + drop(W_narrow relu(W_widen x + b_widen) + b_narrow))

Dropout's mask is a function of (seed, site, place, column) alone, so the backward draws it again and nothing
of it is stored: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed
by the seed. Site 0 follows the first norm; block l has 3l + 1 on the attention probabilities (column
head · S + s for the key at s), 3l + 2 after W_out and 3l + 3 after W_narrow. Places count b · S + s, padding
included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from crossan_fast._checks import FLOATS, check_integer, check_tensor, check_weights, describe
from crossan_fast.ops._contracts import SequenceEncoderBlock, SequenceEncoderWeights
from crossan_fast.ops._dispatch import choose, without_autocast
from crossan_fast.ops._registration import define, differentiate, on_one_device

EPS = 1e-6

# (q, k, v `[B, heads, S, d / heads]`, mask, dropout) → what each place reads, shaped as q: softmax attention
# over the real places so far, with dropout on its probabilities.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def sequence_encoder_reference(
    items: Tensor,
    mask: Tensor,
    weights: SequenceEncoderWeights,
    heads: int,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    attend: Attend | None = None,
) -> Tensor:
    """The definition, in plain torch, usable in float64.

    Args:
        items: `[B, S, d]`, S at most the window.
        mask: bool `[B, S]`, True at real items; what stands elsewhere is not read.
        weights: see `SequenceEncoderWeights`.
        heads: a divisor of d.
        dropout: the probability p of a zero; what is kept is divided by 1 − p.
        seed: int64 scalar that dropout is a function of; None: torch's own generator draws it.
        attend: a library's attention in place of the one written out here.

    Returns:
        `[B, S, d]`, a vector for each prefix, zeros at padding.
    """
    batch, places, width = items.shape
    real = mask[..., None]

    def drop(x: Tensor, site: int) -> Tensor:
        """x `[B, S, …]`; what follows counts as columns, in order."""
        if not dropout:
            return x
        if seed is None:
            return F.dropout(x, dropout)
        keep = dropout_mask(seed, site, batch * places, x.shape[2:].numel(), dropout).view(x.shape)
        return torch.where(keep, x / (1 - dropout), 0)

    def norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), gain, bias, EPS)

    def split(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight).unflatten(-1, (heads, -1)).transpose(1, 2)

    seen = _seen(mask)
    x = torch.where(real, items, 0) + weights.position[weights.position.shape[0] - places :]
    x = drop(norm(x, weights.gain, weights.bias), 0)
    for index, block in enumerate(weights.blocks):
        q, k, v = split(x, block.query), split(x, block.key), split(x, block.value)
        if attend is None:
            scores = (q @ k.mT) * (width // heads) ** -0.5
            probability = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
            mixed = drop(probability.transpose(1, 2), 3 * index + 1).transpose(1, 2) @ v
        else:
            mixed = attend(q, k, v, mask, dropout)
        mixed = mixed.transpose(1, 2).reshape(batch, places, width)
        attended = drop(F.linear(mixed, block.out), 3 * index + 2)
        x = norm(x + attended, block.attention_gain, block.attention_bias)
        inner = F.relu(F.linear(x, block.widen, block.widen_bias))
        forwarded = drop(F.linear(inner, block.narrow, block.narrow_bias), 3 * index + 3)
        x = norm(x + forwarded, block.forward_gain, block.forward_bias)
    return torch.where(real, x, 0)


def _seen(mask: Tensor) -> Tensor:
    """Which places each one attends to, bool `[B, 1, S, S]`: the real ones so far."""
    places = mask.shape[1]
    causal = torch.ones(places, places, dtype=torch.bool, device=mask.device).tril()
    # A padding place sees itself, so that its softmax is not over nothing.
    itself = torch.eye(places, dtype=torch.bool, device=mask.device)
    return ((causal & mask[:, None, :]) | itself)[:, None]


def dropout_mask(seed: Tensor, site: int, places: int, columns: int, probability: float) -> Tensor:
    """Which numbers dropout keeps: bool `[places, columns]`; see the top of the file.

    Column c takes word `c % 64 // 16` of the counter (`c // 64 · 16 + c % 16`, low place, site, high place),
    and is dropped where that is below p · 2^32.
    """
    low, device = 0xFFFFFFFF, seed.device
    column, place = torch.arange(columns, device=device), torch.arange(places, device=device)[:, None]
    shape = (places, columns)
    state = [column // 64 * 16 + column % 16, place & low, torch.full((), site, device=device), place >> 32]
    a, b, c, d = (word.expand(shape) for word in state)
    keys = [seed & low, (seed >> 32) & low]
    for _ in range(10):
        # Products of two 32-bit numbers wrap into int64's sign; shifted and masked they are what they were.
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = ((q >> 32) & low) ^ b ^ keys[0], q & low, ((p >> 32) & low) ^ d ^ keys[1], p & low
        keys = [(keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low]
    words = torch.stack([a, b, c, d])
    which = (column % 64 // 16).expand(shape)
    return words.gather(0, which[None])[0] >= min(round(probability * 2**32), low)


@on_one_device
def sequence_encoder(
    items: Tensor,
    mask: Tensor,
    weights: SequenceEncoderWeights,
    heads: int,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """User vectors from item embeddings, differentiable in `items` and all weights.

    Arguments as `sequence_encoder_reference`. The result has the type that items and weights promote to, as
    the modules' has under autocast too; the compiled op computes in fp32 at least.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named.
        BackendUnavailable: `backend` was asked for by name and can't serve.
    """
    _check(items, mask, weights, heads, dropout, seed)
    dtype = torch.promote_types(items.dtype, weights.position.dtype)
    window, width = weights.position.shape
    sizes = (f"window={window}", f"width={width}", f"blocks={len(weights.blocks)}")
    choice = choose("sequence_encoder", items.device.type, dtype, sizes, backend)
    if choice.backend == "eager":
        own = SequenceEncoderWeights.unflatten([weight.to(dtype) for weight in weights.flatten()])
        with without_autocast(items.device.type):
            return sequence_encoder_reference(items.to(dtype), mask, own, heads, dropout=dropout, seed=seed)
    if dropout and seed is None:
        # From torch's own generator: a run repeats under torch.manual_seed, and no two steps drop the same.
        seed = torch.randint(2**63 - 1, (), device=items.device)
    flat = weights.flatten()
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (items, *flat))
    return _sequence_encoder(items, mask, flat, heads, EPS, dropout, seed, keep, dtype, choice.backend)[0]


def _check(
    items: Tensor,
    mask: Tensor,
    weights: SequenceEncoderWeights,
    heads: int,
    dropout: float,
    seed: Tensor | None,
) -> None:
    check_weights(weights, SequenceEncoderWeights)
    check_tensor("gain", weights.gain, (None,), dtypes=FLOATS)
    width = weights.gain.shape[0]
    check_tensor("items", items, (None, None, width), dtypes=FLOATS)
    check_tensor("mask", mask, (None, None), dtypes=(torch.bool,))
    if mask.shape != items.shape[:2]:
        raise ValueError(f"mask: expected {list(items.shape[:2])} as in items, got {describe(mask)}")
    check_tensor("position", weights.position, (None, width), dtypes=FLOATS)
    if items.shape[1] > weights.position.shape[0]:
        raise ValueError(
            f"items: expected at most {weights.position.shape[0]} places, the rows of position, "
            f"got {describe(items)}"
        )
    check_tensor("bias", weights.bias, (width,), dtypes=FLOATS)
    if not isinstance(weights.blocks, (list, tuple)):
        raise TypeError(f"blocks: expected a list of SequenceEncoderBlock, got {describe(weights.blocks)}")
    for index, block in enumerate(weights.blocks):
        if not isinstance(block, SequenceEncoderBlock):
            raise TypeError(f"blocks[{index}]: expected SequenceEncoderBlock, got {describe(block)}")
        if not isinstance(block.widen, Tensor) or block.widen.dim() != 2:
            check_tensor(f"blocks[{index}].widen", block.widen, (None, width))
        inner = block.widen.shape[0]
        shapes = [(width, width)] * 4 + [(width,)] * 2 + [(inner, width), (inner,), (width, inner)]
        shapes += [(width,)] * 3
        for name, tensor, shape in zip(block._fields, block, shapes, strict=True):
            # The names are put together only for a complaint: this runs at every step.
            dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided
            if not dense or tensor.shape != shape or tensor.dtype not in FLOATS:
                check_tensor(f"blocks[{index}].{name}", tensor, shape, dtypes=FLOATS)
    check_integer("heads", heads, 1)
    if width < 1 or width % heads:
        raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
    if seed is not None:
        check_tensor("seed", seed, (), dtypes=(torch.int64,))


def kept_width(width: int, inner: int, heads: int, blocks: int) -> int:
    """Numbers kept of a place. Of each block q, k, v, what attention mixed, two normalised rows and the inner
    row, each with 16 to spare, a log-sum-exp a head and two scales; before the blocks two rows and a scale.
    """
    rows = (3 * width + 16) + 3 * (width + 16) + (inner + 16)
    return blocks * (rows + heads + 2) + 2 * (width + 16) + 1


def _fake(items, mask, weights, heads, eps, dropout, seed, keep, dtype):
    """Users, and with `keep` what the backward reads: `[B·S, kept_width]`, else no rows of it."""
    layers = SequenceEncoderWeights.unflatten(weights).blocks
    blocks, inner = len(layers), layers[0].widen.shape[0] if layers else 0
    wide = torch.promote_types(dtype, torch.float32)
    kept = (items.shape[0] * items.shape[1] if keep else 0, kept_width(items.shape[2], inner, heads, blocks))
    return items.new_empty(items.shape, dtype=dtype), items.new_empty(kept, dtype=wide)


def _fake_backward(grad_users, kept, items, mask, weights, *rest):
    """Gradients of `items`, then of `weights`."""
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (items, *weights)]


def _keep(ctx, arguments, output):
    items, mask, weights, heads, eps, dropout, seed, _, dtype, backend = arguments
    ctx.static = heads, eps, dropout, dtype, backend
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], items, mask, seed, *weights)


def _backward(ctx, grad_users, _):
    if grad_users is None:
        return (None,) * 4
    kept, items, mask, seed, *weights = ctx.saved_tensors
    heads, eps, dropout, dtype, backend = ctx.static
    grad_items, *grad_weights = _sequence_encoder_backward(
        grad_users, kept, items, mask, weights, heads, eps, dropout, seed, dtype, backend
    )
    return grad_items, None, grad_weights, None


_COMMON = "Tensor items, Tensor mask, Tensor[] weights, int heads, float eps, float dropout, Tensor? seed"
_sequence_encoder = define(
    f"sequence_encoder({_COMMON}, bool keep, ScalarType dtype) -> (Tensor, Tensor)", _fake
)
_sequence_encoder_backward = define(
    f"sequence_encoder_backward(Tensor grad_users, Tensor kept, {_COMMON}, ScalarType dtype) -> Tensor[]",
    _fake_backward,
)
differentiate(_sequence_encoder, _keep, _backward)
