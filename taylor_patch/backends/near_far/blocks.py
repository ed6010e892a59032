"""Key blocks of one head in plain PyTorch: what the far field needs of them, their predicted masses, and which of them are near."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_patch.backends.tiles import is_line
from taylor_patch.call import TokenGrid

ROUTING_SAMPLES = 4
"""Means of a query block's quarters, which vote on its near blocks."""
TILT_LIMIT = 2.0
"""Standard deviation of a query's logits within a block from which the block's expansion goes on as a straight line (see tilt)."""

FEW_BLOCKS = 200
"""Image blocks of the keys below which a head behaves otherwise: its error falls late with the density (aim.how_between), and eight
neighbours would be a large share of all blocks (sees_neighbours)."""


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


def largest(mask: Tensor) -> Tensor:
    """Largest value of each row of an additive mask [..., N_kv], 0 for a row without a finite one.

    It is taken off the row, which changes no softmax: the weights exp(mask) then neither overflow nor vanish all together.
    """
    return mask.amax(-1).nan_to_num(0.0, 0.0, 0.0)


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
    return Blocks(kb, vb, log_weight, mean_k, mean_v, mass.log(), trace / mean_trace.clamp_min(torch.finfo(k.dtype).tiny),
                  weighted.T @ dk.flatten(0, 1), weighted.T @ dv.flatten(0, 1))


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


def sees_neighbours(own: bool, grid: TokenGrid, image_blocks: int) -> bool:
    """Whether the blocks around a query block are near whatever their mass: in pictures of many blocks (ADR 14). own: queries and keys lie in
    the same blocks."""
    return own and grid.t == 1 and not is_line(grid) and image_blocks >= FEW_BLOCKS


def near_blocks(mass: Tensor, density: float, blocks: Blocks, own: bool, neighbours: Tensor | None = None) -> Tensor:
    """Near blocks [query blocks, key blocks] bool: the share `density` with most mass in the head, each query block's best one, and where
    keys and queries lie in the same blocks (own) the query block itself. neighbours: near before any others, [query blocks, key blocks]."""
    wanted = max(1, min(mass.numel(), round(density * mass.numel())))
    rank = mass if neighbours is None else mass.masked_fill(neighbours, torch.inf)
    threshold = rank.flatten().kthvalue(mass.numel() - wanted + 1).values
    near = rank >= threshold if density >= 1 else (rank > threshold)
    if neighbours is not None:
        near |= neighbours
    near.scatter_(1, mass.argmax(1, keepdim=True), True)
    if own:
        near.fill_diagonal_(True)
    return near & blocks.log_mass.isfinite()


def tilt(q: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """(log mean exp of a query's logits within a block less their mean, what the linear term of the values counts), [..., 1] each.

    With the deviation s = (q' S_w q)^1/2 these are s^2 / 2 and 1 up to s = TILT_LIMIT = L, and L s - L^2 / 2 and L / s beyond. Of 64 keys
    the log mean exp grows no faster than s times the highest key, and no mean of values lies outside them, where the expansion would
    go on as a parabola and without bound. (Normal logits freeze at L = (2 ln 64)^1/2 = 2.9: Derrida 1981, the random energy model. 2
    serves trained attention better: ADR 16.)
    """
    variance = ((q @ blocks.cov_kk) * q).sum(-1, keepdim=True).clamp_min(0)
    deviation = variance.sqrt()
    straight = TILT_LIMIT * deviation - 0.5 * TILT_LIMIT**2
    return torch.where(deviation < TILT_LIMIT, 0.5 * variance, straight), TILT_LIMIT / deviation.clamp_min(TILT_LIMIT)


def tail_logits(q: Tensor, blocks: Blocks, factor: float = 1.0) -> Tensor:
    """Logits [..., n_blocks] of block means with the second-order term times `factor`; q [..., D] times scale."""
    return q @ blocks.mean_k.T + blocks.log_mass + factor * tilt(q, blocks)[0] * blocks.spread
