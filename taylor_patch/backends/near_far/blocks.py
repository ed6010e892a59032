"""Key blocks of one head in plain PyTorch: what the far field needs of them, their predicted masses, and which of them are near."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANK, ROUNDS, LEAST = 8, 4, 1e-12
"""Directions of the second-order value term; rounds of the iteration that finds them, and the square of the length, in units of the mean
trace, up to which a direction is none."""
ROUTING_SAMPLES = 4
"""Sub-means of a query block that vote on its near blocks."""


@dataclass(frozen=True)
class Blocks:
    """Key blocks of one head: members and what the far field needs of them."""

    k: Tensor  # [n_blocks, 64, D]
    v: Tensor  # [n_blocks, 64, D]
    log_weight: Tensor  # [n_blocks, 64]: log weight of each key, -inf where there is none
    mean_k: Tensor  # [n_blocks, D]
    mean_v: Tensor  # [n_blocks, D]
    log_mass: Tensor  # [n_blocks]: log of the summed weights, -inf for an empty block
    spread: Tensor  # [n_blocks]: t_b
    cov_kk: Tensor  # [D, D]: S_w
    cov_kv: Tensor  # [D, D]: C_w
    directions: Tensor  # [D, 8]: U
    third: Tensor  # [64, D]: T, pooled mean of (U'(k - k_b)) (U'(k - k_b))' (v - v_b)


def gather_blocks(k: Tensor, v: Tensor, bias: Tensor, index: Tensor, filled: Tensor) -> Blocks:
    """Key blocks of one head and their statistics. k, v [N, D], bias [N], index and filled [n_blocks, 64]."""
    log_weight = bias[index].masked_fill(~filled, -torch.inf)
    weight = log_weight.exp()
    mass = weight.sum(1)
    share = weight / mass.clamp_min(torch.finfo(k.dtype).tiny)[:, None]
    kb, vb = k[index], v[index]
    mean_k, mean_v = ((share[..., None] * x).sum(1) for x in (kb, vb))
    total = mass.sum().clamp_min(torch.finfo(k.dtype).tiny)
    dk, dv = kb - mean_k[:, None], vb - mean_v[:, None]
    weighted = (dk * (weight / total)[..., None]).flatten(0, 1)
    trace = (share * dk.square().sum(-1)).sum(1)
    mean_trace = (trace * mass).sum() / total
    mean_trace = mean_trace.clamp_min(torch.finfo(k.dtype).tiny)
    cov_kk = weighted.T @ dk.flatten(0, 1)
    directions = leading_directions(cov_kk / mean_trace)
    third = squares(dk.flatten(0, 1) @ directions).T @ (dv * (weight / total)[..., None]).flatten(0, 1)
    return Blocks(kb, vb, log_weight, mean_k, mean_v, mass.log(), trace / mean_trace, cov_kk, weighted.T @ dv.flatten(0, 1), directions, third)


def leading_directions(covariance: Tensor) -> Tensor:
    """About the RANK leading eigenvectors [D, RANK] of a covariance [D, D] of trace 1; zeros beyond its rank.

    A few rounds of orthogonal iteration from a fixed start, the same on every device; any basis of about their span will do.
    """
    place = torch.arange(1, covariance.shape[0] + 1, device=covariance.device)[:, None]
    number = torch.arange(RANK, device=covariance.device)
    columns = ((place * place * (2 * number + 1) + place * (5 * number + 13)) % 61 - 30).to(covariance.dtype) / 61
    for _ in range(ROUNDS):
        columns = covariance @ columns
        for i in range(RANK):
            square = columns[:, i].square().sum()
            column = columns[:, i] * torch.where(square > LEAST, square.clamp_min(LEAST).rsqrt(), 0.0)
            columns = torch.cat([columns[:, :i], column[:, None], columns[:, i + 1 :] - column[:, None] * (column @ columns[:, i + 1 :])], 1)
    return columns


def squares(w: Tensor) -> Tensor:
    """w [..., RANK] -> all products of two of a row [..., RANK^2]."""
    return (w[..., :, None] * w[..., None, :]).flatten(-2)


def masses(q_blocks: Tensor, filled: Tensor, blocks: Blocks) -> Tensor:
    """Predicted softmax mass [query blocks, key blocks], the mean over the quarters of a query block.

    q_blocks: [query blocks, 64, D] times scale; filled: [query blocks, 64].
    """
    n_blocks, _, dim = q_blocks.shape
    member = filled.view(n_blocks, ROUTING_SAMPLES, -1, 1).to(q_blocks.dtype)
    count = member.sum(2)
    sample = (q_blocks.view(n_blocks, ROUTING_SAMPLES, -1, dim) * member).sum(2) / count.clamp_min(1)
    score = torch.softmax(sample @ blocks.mean_k.T + blocks.log_mass, -1).nan_to_num(0.0)
    return (score * (count / count.sum(1, keepdim=True).clamp_min(1))).sum(1)


def near_blocks(mass: Tensor, density: float, blocks: Blocks, own: bool) -> Tensor:
    """Near blocks [query blocks, key blocks] bool: the share `density` with most mass in the head, each query block's best one, and where
    keys and queries lie in the same blocks (own) the query block itself."""
    wanted = max(1, min(mass.numel(), round(density * mass.numel())))
    threshold = mass.flatten().kthvalue(mass.numel() - wanted + 1).values
    near = mass >= threshold if density >= 1 else (mass > threshold)
    near.scatter_(1, mass.argmax(1, keepdim=True), True)
    if own:
        near.fill_diagonal_(True)
    return near & blocks.log_mass.isfinite()


def tail_logits(q: Tensor, blocks: Blocks, factor: float = 1.0) -> Tensor:
    """Logits [..., n_blocks] of block means with the second-order term times `factor`; q [..., D] times scale."""
    return q @ blocks.mean_k.T + blocks.log_mass + (0.5 * factor) * ((q @ blocks.cov_kk) * q).sum(-1, keepdim=True) * blocks.spread


def value_terms(q: Tensor, blocks: Blocks) -> Tensor:
    """What a far block's value has beyond its mean [..., D]: C_w' q + 1/2 (U'q)' T (U'q); q [..., D] times scale."""
    return q @ blocks.cov_kv + 0.5 * squares(q @ blocks.directions) @ blocks.third
