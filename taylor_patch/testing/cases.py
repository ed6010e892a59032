"""Attention calls that are easy to approximate, in the layouts in which models pass them, and their exact answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_patch.backends.base import expand_kv
from taylor_patch.call import AttentionCall, TokenGrid

GRID = (1, 12, 12)
LONG_GRID = (1, 32, 34)
"""1,095 tokens with TEXT: an odd number above the usual numbers of rows that are worked on at once."""
TEXT = 7
LOGIT_STD = 0.15
LARGE_STD = 3.0
LARGE_OFFSET = 100.0


def make_call(head_dim: int, dtype: torch.dtype, device: str, *, batch: int = 2, heads: int = 2, kv_heads: int | None = None,
              grid: tuple[int, int, int] = GRID, text: int = TEXT, after: int = 0, n_kv: int | None = None,
              scale: float | None = None, seed: int = 0) -> AttentionCall:
    """A self-attention call of a grid between `text` and `after` other tokens, or a cross-attention call with n_kv keys and no grid.

    Keys and values vary smoothly over the grid, as they do in trained models. Other seeds give other values.
    """
    generator = torch.Generator().manual_seed(seed)
    where = TokenGrid(*grid, start=text)

    def tensor(heads: int, tokens: int, smooth: bool) -> Tensor:
        noise = torch.randn(batch, heads, tokens, head_dim, generator=generator)
        if not smooth:
            return noise
        t, h, w = grid
        coarse = torch.randn(batch, heads * head_dim, -(-t // 2), -(-h // 6), -(-w // 6), generator=generator)
        field = F.interpolate(coarse, size=grid, mode="trilinear").view(batch, heads, head_dim, t * h * w).transpose(2, 3)
        noise[:, :, text:tokens - after] = 0.2 * noise[:, :, text:tokens - after] + field
        return noise

    tokens = text + where.tokens + after
    cross = n_kv is not None
    q = tensor(heads, tokens, False) * LOGIT_STD
    k = tensor(kv_heads or heads, n_kv or tokens, not cross)
    v = tensor(kv_heads or heads, n_kv or tokens, not cross)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    return AttentionCall(q, k, v, scale=head_dim**-0.5 if scale is None else scale, grid=None if cross else where)


def changed(call: AttentionCall, change: Callable[[Tensor], Tensor]) -> AttentionCall:
    """`call` with `change` applied to q, k and v."""
    return dataclasses.replace(call, q=change(call.q), k=change(call.k), v=change(call.v))


def exact(call: AttentionCall) -> Tensor:
    """Attention of `call` in float64: [B, H, N_q, D]."""
    heads = call.q.shape[1]
    q, k, v = call.q.double(), expand_kv(call.k, heads).double(), expand_kv(call.v, heads).double()
    logits = q @ k.transpose(-1, -2) * call.scale
    if call.key_mask is not None:
        logits = logits + call.key_mask.double()[:, None, None]
    if call.row_mask is not None:
        mask = call.row_mask
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.double()
    return torch.softmax(logits, -1) @ v


def relative_error(out: Tensor, answer: Tensor) -> float:
    """||out - answer|| / ||answer||, in float64."""
    return float((out.double() - answer).norm() / answer.norm())


def large_logits(call: AttentionCall) -> AttentionCall:
    """`call` with q and k of standard deviation 3, and 100 added to the keys: peaked rows, and logits of some hundreds.

    What is added to all keys adds the same to every logit of a row, which changes no softmax.
    """
    k = LARGE_STD * (call.k - call.k.mean()) / call.k.std() + LARGE_OFFSET
    return dataclasses.replace(call, q=call.q * (LARGE_STD / LOGIT_STD), k=k)


def key_mask(call: AttentionCall) -> Tensor:
    """[B, N_kv] additive float32 that hides every third key and weakens every seventh, others in each entry of the batch."""
    mask = torch.zeros(call.k.shape[0], call.k.shape[2], device=call.k.device)
    for entry, row in enumerate(mask):
        row[(1 + entry) % 7 :: 7] = -0.5
        row[entry % 3 :: 3] = -math.inf
    return mask


def _one_for_all(call: AttentionCall) -> Tensor:
    return key_mask(call)[:1]


def _positive(call: AttentionCall) -> Tensor:
    mask = key_mask(call)
    return mask.masked_fill(mask == -0.5, 1.5)


def _large_bias(call: AttentionCall) -> Tensor:
    entry = torch.arange(call.k.shape[0], device=call.k.device)[:, None]
    return key_mask(call) + torch.where(entry % 2 == 0, 1000.0, -20000.0)


def _most_negative(call: AttentionCall) -> Tensor:
    return key_mask(call).clamp_min(torch.finfo(torch.float32).min)


KEY_MASKS: dict[str, Callable[[AttentionCall], Tensor]] = {
    "one for all entries of the batch, [1, N_kv]": _one_for_all,
    "a bias above 0": _positive,
    "a bias of 1000 on every key, -20000 in the next entry": _large_bias,
    "keys hidden by the most negative number": _most_negative,
}
"""What it is -> function from a call to a key mask, beside those of key_mask."""


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    rows = x.transpose(1, 2)
    return torch.stack((rows, rows + 1, rows - 1), 2)[:, :, 0].transpose(1, 2)


def _every_second(x: Tensor) -> Tensor:
    return torch.stack((x, x + 1), -1)[..., 0]


def _offset(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": Tensor.contiguous,
    "tokens first, [B, N, H, D]": _tokens_first,
    "a part of packed q, k and v, [B, N, 3, H, D]": _packed,
    "last dimension with stride 2": _every_second,
    "data that is not aligned": _offset,
}
"""What it is -> function from [B, H, N, D] to a view of other memory with the same values and that layout."""
