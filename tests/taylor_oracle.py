"""Global Taylor attention as the polynomial of the N x M logits, in float64: no features, no streaming."""

import math

import torch

from taylor_patch.backends.taylor.base import TaylorBackend
from taylor_patch.backends.taylor.denominators import mask_weight


def dense(call, options):
    """[B, H, N_q, D] float64 of an AttentionCall under TaylorOptions."""
    backend = TaylorBackend(options)
    o = backend.options
    q, k, v = call.q.double(), call.k.double(), call.v.double()
    q_factor, k_factor = backend.norm_factor(q, call.sigma), backend.norm_factor(k, call.sigma)
    if q_factor is not None:
        q, k = q * q_factor[..., None], k * k_factor[..., None]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q, k, v = (x.unflatten(-1, (o.sub_head_blocks, -1)).transpose(2, 3) for x in (q, k, v))  # [B, H, blocks, N, d]
    share = torch.full((1, k.shape[3]), 1 / k.shape[3], dtype=torch.float64, device=k.device)
    if call.key_mask is not None:
        weight = mask_weight(call.key_mask.double())
        share = weight / weight.sum(1, keepdim=True)
    share = share[:, None, None, None]  # [B or 1, 1, 1, 1, N_kv]
    if o.center_keys:
        k = k - share @ k
    x = backend.scale(call) * q @ k.transpose(-1, -2)
    if o.coefficients == "hermite":
        s = (share * x**2).sum(-1, keepdim=True).sqrt()
        y = x / s
        polynomials = [torch.ones_like(y), y]
        while len(polynomials) < o.P:
            polynomials.append(y * polynomials[-1] - (len(polynomials) - 1) * polynomials[-2])
        weight = sum(s**p / math.factorial(p) * polynomials[p] for p in range(o.P))
    else:
        weight = sum(x**p / math.factorial(p) for p in range(o.P))
    weight = weight * share
    return (weight @ v / weight.sum(-1, keepdim=True)).transpose(2, 3).flatten(3)


def relative(a, b):
    """|a - b| / |b|."""
    return float((a.double() - b).norm() / b.norm())
