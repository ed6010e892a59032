"""The symmetric basis: (q.k)^p = sum over multisets i1 <= ... <= ip of weight * monomial(q) * monomial(k).

weight is the multinomial coefficient p! / prod(multiplicity!), so degree p needs C(d+p-1, p) features instead of d^p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations_with_replacement, islice

import torch
from torch import Tensor


def feature_count(dim: int, terms: int) -> int:
    """R = C(dim+terms-1, terms-1): all features of degree 0 to terms-1."""
    return math.comb(dim + terms - 1, terms - 1)


def index_chunks(dim: int, degree: int, chunk: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (indices [F, degree] int64, weights [F] float64) with F <= chunk, in lexicographic order."""
    multisets = combinations_with_replacement(range(dim), degree)
    while rows := list(islice(multisets, chunk)):
        weights = [multiplicity_weight(row) for row in rows]
        yield (torch.tensor(rows, dtype=torch.int64, device=device).reshape(len(rows), degree),
               torch.tensor(weights, dtype=torch.float64, device=device))


def multiplicity_weight(multiset: tuple[int, ...]) -> float:
    """p! / prod(multiplicity!) of one sorted multiset."""
    weight = math.factorial(len(multiset))
    for index in set(multiset):
        weight //= math.factorial(multiset.count(index))
    return float(weight)


def monomials(x: Tensor, indices: Tensor) -> Tensor:
    """x [..., D], indices [F, degree] -> prod_j x[..., indices[:, j]] [..., F]; ones for degree 0."""
    if indices.shape[1] == 0:
        return torch.ones(*x.shape[:-1], indices.shape[0], dtype=x.dtype, device=x.device)
    first, *others = indices.unbind(1)
    out = x.index_select(-1, first)
    for column in others:
        out *= x.index_select(-1, column)
    return out
