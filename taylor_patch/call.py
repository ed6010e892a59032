"""AttentionCall: one normalised view of an attention call, whatever layout it came in. Views only, no copies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from taylor_patch.quality import DEFAULT, QUALITIES


@dataclass(frozen=True)
class TokenGrid:
    """Where the image tokens of a sequence lie: tokens [start, start + t*h*w) are a row-major t x h x w grid."""

    t: int
    h: int
    w: int
    start: int = 0

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w


@dataclass(frozen=True)
class AttentionCall:
    """What a backend sees.

    q: [B, H, N_q, D]; k, v: [B, H_kv, N_kv, D], fp16, bf16 or fp32, any strides, H a multiple of H_kv.
    key_mask: [B or 1, N_kv] additive float32 (-inf hides a key), or None.
    row_mask: a mask that depends on the query row or the head, as it came ([B or 1, H or 1, N_q, N_kv], bool or additive), or None.
    scale: factor of q.k before the softmax (1/sqrt(D) unless the caller gave one).
    grid: where the image tokens are, or None where that is not known; grid_reason then says why. In cross-attention that is among the queries.
    key_grid: in cross-attention, where the image tokens are among the keys, or None where that is not known.
    step, sigma, block: position in the sampling run, None outside one.
    target_error: relative L2 error that the user's `quality` allows.
    fingerprint: what tells models of one kind from others (run.fingerprint_of), None outside a model evaluation.
    memo: where a backend may keep what it has settled until the run ends (every backend under a name of its own), None outside a run.
    first_head: which query head of the model's call is the first one here; above 0 only where the engine splits a call over heads.
    cond_or_uncond: which prompts the evaluation is for, as ComfyUI numbers them (0: positive, 1: negative) in the order of the batch; empty
    where that is not known.
    A backend returns [B, H, N_q, D] in q's dtype and leaves q, k, v as they are.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    key_mask: Tensor | None = None
    row_mask: Tensor | None = None
    grid: TokenGrid | None = None
    grid_reason: str = "the token grid is not known"
    step: int | None = None
    sigma: float | None = None
    block: int | None = None
    model: str | None = None
    target_error: float = QUALITIES[DEFAULT]
    fingerprint: str | None = None
    memo: dict[Any, Any] | None = field(default=None, compare=False, repr=False)
    first_head: int = 0
    key_grid: TokenGrid | None = None
    cond_or_uncond: tuple[int, ...] = ()

    @property
    def self_attention(self) -> bool:
        return self.q.shape[2] == self.k.shape[2]

    @property
    def signature(self) -> tuple[Any, ...]:
        """Everything that a routing decision may depend on besides step, sigma and block."""
        return (tuple(self.q.shape), tuple(self.k.shape), self.q.dtype, self.q.device,
                None if self.key_mask is None else tuple(self.key_mask.shape), self.row_mask is None, self.grid, self.grid_reason,
                self.key_grid, self.model, self.first_head)


class Unsupported(Exception):
    """The call has a form that no backend handles; the original function answers it. The text is the reason."""


def split_heads(x: Tensor, heads: int, skip_reshape: bool, name: str) -> Tensor:
    """[B, N, heads*D] (or [B, heads, N, D] with skip_reshape) -> [B, heads, N, D] view.

    4-D input without skip_reshape is [B, N, heads, D], as SD3 passes it.
    """
    if skip_reshape:
        if x.dim() != 4:
            raise Unsupported(f"{name} is {x.dim()}-D with skip_reshape")
        return x
    if x.dim() == 4:
        return x.transpose(1, 2)
    if x.dim() != 3 or x.shape[-1] % heads:
        raise Unsupported(f"{name} has an unknown layout")
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def key_mask(mask: Tensor, batch: int, n_kv: int) -> Tensor | None:
    """A mask of ComfyUI as [B or 1, N_kv] additive float32, or None where it depends on the query row or head.

    mask: bool (True = keep) or additive; 2-D [N_q or 1, N_kv], 3-D [B or 1, N_q or 1, N_kv] or 4-D [B or 1, H or 1, N_q or 1,
    N_kv] (attention_pytorch of ComfyUI 0.33.0: 2-D and 3-D masks get leading dimensions).
    """
    if mask.dim() not in (2, 3, 4) or mask.shape[-1] != n_kv or mask.shape[-2] != 1:
        return None
    if mask.dim() == 4 and mask.shape[1] != 1:
        return None
    flat = mask.reshape(-1, n_kv)
    if flat.shape[0] not in (1, batch):
        return None
    if flat.dtype == torch.bool:
        return torch.zeros(flat.shape, dtype=torch.float32, device=flat.device).masked_fill(~flat, -math.inf)
    return flat.float()


def from_comfyui(q: Tensor, k: Tensor, v: Tensor, heads: int, *, mask: Tensor | None = None, skip_reshape: bool = False,
                 scale: float | None = None, enable_gqa: bool = False) -> AttentionCall:
    """AttentionCall of the arguments of ComfyUI's optimized_attention. Raises Unsupported with the reason."""
    q4 = split_heads(q, heads, skip_reshape, "q")
    head_dim = q4.shape[-1]
    heads_kv = heads
    if enable_gqa:
        heads_kv = k.shape[1] if skip_reshape else k.shape[-1] // head_dim if k.dim() == 3 else k.shape[2]
    k4 = split_heads(k, heads_kv, skip_reshape, "k")
    v4 = split_heads(v, heads_kv, skip_reshape, "v")
    if q4.shape[1] != heads:
        raise Unsupported("q, k and v do not fit together")
    return from_heads_first(q4, k4, v4, mask=mask, scale=scale)


def from_heads_first(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None,
                     grid: TokenGrid | None = None, key_grid: TokenGrid | None = None,
                     target_error: float = QUALITIES[DEFAULT]) -> AttentionCall:
    """AttentionCall of q [B, H, N_q, D] and k, v [B, H_kv, N_kv, D]. Raises Unsupported with the reason."""
    if any(x.dim() != 4 for x in (q, k, v)):
        raise Unsupported(f"q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dimensions; each needs 4, [B, H, N, D]")
    if k.shape[:3] != v.shape[:3] or k.shape[-1] != q.shape[-1] or k.shape[0] != q.shape[0]:
        raise Unsupported("q, k and v do not fit together")
    if v.shape[-1] != q.shape[-1]:
        raise Unsupported("head_dim of v differs from that of q")
    if q.shape[1] % k.shape[1]:
        raise Unsupported("the number of heads is not a multiple of the key heads")
    if mask is not None and (mask.dim() < 2 or mask.shape[-1] not in (1, k.shape[2]) or mask.shape[-2] not in (1, q.shape[2])):
        raise Unsupported(f"mask {list(mask.shape)} does not fit {q.shape[2]} queries and {k.shape[2]} keys")
    keys = None if mask is None else key_mask(mask, q.shape[0], k.shape[2])
    rows = mask if mask is not None and keys is None else None
    if rows is not None:
        rows = rows[(None,) * (3 - rows.dim())] if rows.dim() < 3 else rows
        rows = rows[:, None] if rows.dim() == 3 else rows
    return AttentionCall(q, k, v, scale=q.shape[-1] ** -0.5 if scale is None else float(scale), key_mask=keys, row_mask=rows,
                         grid=grid, key_grid=key_grid, target_error=target_error)


def merge_heads(out: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H*D], the layout that ComfyUI's models expect."""
    return out.transpose(1, 2).flatten(2)
