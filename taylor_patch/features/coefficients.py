"""Coefficients of x^p / p! in the polynomial that stands for exp(x)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def taylor(terms: int, variance: Tensor) -> Tensor:
    """Ones [..., terms]: the Taylor series of exp around 0. variance: [...], used for its shape only."""
    return torch.ones(*variance.shape, terms, dtype=variance.dtype, device=variance.device)


def hermite(terms: int, variance: Tensor) -> Tensor:
    """Coefficients [..., terms] of the L2-optimal polynomial for x ~ N(0, variance), per query.

    exp(x) ~ e^{s^2/2} sum_{p < terms} s^p/p! He_p(x/s). Collected by powers, the coefficient of x^j/j! is
    sum over m with j + 2m < terms of (-s^2/2)^m / m!; the factor e^{s^2/2} is common to all features of a query and
    cancels between numerator and denominator, so it is left out.
    """
    columns = []
    for power in range(terms):
        total = torch.zeros_like(variance)
        for m in range((terms - 1 - power) // 2 + 1):
            total = total + (-variance / 2) ** m / math.factorial(m)
        columns.append(total)
    return torch.stack(columns, -1)
