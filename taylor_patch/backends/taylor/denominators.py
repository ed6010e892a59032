"""Denominators of the global Taylor backends: the weights of keys that they sum, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_patch.features import coefficients as series


@dataclass(frozen=True)
class DenominatorStats:
    """Denominators of one call or of its probe: how many, the fraction not above eps, and their range."""

    count: int
    bad_fraction: float
    least: float
    greatest: float
    mean: float

    def __str__(self) -> str:
        return (f"{self.bad_fraction:.4g} of {self.count} denominators not above eps "
                f"(least {self.least:.4g}, greatest {self.greatest:.4g}, mean {self.mean:.4g})")


def mask_weight(mask: Tensor) -> Tensor:
    """Additive key mask [B, N_kv] -> weights exp(mask - max) [B, N_kv] in 0 to 1; 0 hides a key."""
    top = mask.amax(1, keepdim=True)
    return torch.where(top.isfinite(), torch.exp(mask - top), torch.zeros_like(mask))


def denominators_of(power_sums: Tensor, hermite: bool) -> Tensor:
    """Power sums of logits over the keys [..., P] (weights in power 0) -> denominators [...] divided by the sum of weights."""
    terms = power_sums.shape[-1]
    means = power_sums / power_sums[..., :1]
    coefficient = series.hermite(terms, means[..., 2]) if hermite and terms > 2 else torch.ones_like(means)
    factorials = torch.tensor([math.factorial(p) for p in range(terms)], dtype=means.dtype, device=means.device)
    return (coefficient * means / factorials).sum(-1)


def stats_of(summary: Sequence[float], count: int) -> DenominatorStats:
    """(bad ones, least, greatest, sum) of `count` denominators, as statistics."""
    bad, least, greatest, total = summary
    return DenominatorStats(count, bad / count, least, greatest, total / count)
