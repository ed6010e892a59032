"""A global Taylor backend's result by the polynomial of the logits: no features, for a few query rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taylor_patch.backends.taylor.denominators import mask_weight
from taylor_patch.call import AttentionCall
from taylor_patch.features import coefficients as series

if TYPE_CHECKING:
    from taylor_patch.backends.taylor.base import TaylorBackend


def polynomial(backend: TaylorBackend, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """What `backend` computes, by the polynomial of the logits: (out [B, H, N_q, D], denominators [B, H, blocks, N_q]), both float32.

    call: float32, with as many key heads as query heads.
    """
    o = backend.options
    share = torch.full((1, call.k.shape[2]), 1 / call.k.shape[2], device=call.k.device)
    if call.key_mask is not None:
        weight = mask_weight(call.key_mask)
        share = weight / weight.sum(1, keepdim=True)
    share = share[:, None, None, None]
    factors = backend.norm_factor(call.q, call.sigma), backend.norm_factor(call.k, call.sigma), None
    q, k, v = ((x if factor is None else x * factor[..., None]).unflatten(-1, (o.sub_head_blocks, -1)).transpose(2, 3)
               for x, factor in zip((call.q, call.k, call.v), factors, strict=True))
    if o.center_keys:
        k = k - share @ k
    logits = backend.scale(call) * q @ k.transpose(-1, -2)
    coefficient = (series.hermite if o.coefficients == "hermite" else series.taylor)(o.P, (share * logits**2).sum(-1))
    weight, power = torch.zeros_like(logits), share.expand_as(logits)
    for degree in range(o.P):
        weight = weight + coefficient[..., degree, None] / math.factorial(degree) * power
        power = power * logits
    denominators = weight.sum(-1)
    return (weight @ v / denominators[..., None]).transpose(2, 3).flatten(3), denominators
