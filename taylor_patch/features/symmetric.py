"""The symmetric basis: (q.k)^p = sum over multisets i1 <= ... <= ip of weight * monomial(q) * monomial(k).

weight is the multinomial coefficient p! / prod(multiplicity!), so degree p needs C(d+p-1, p) features instead of d^p.
Multisets are numbered in colexicographic order: those with all elements below m are the first C(m+p-1, p), which does not
depend on d. A rank is turned into its multiset on the device, so no list of features is ever made on the host.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from taylor_patch import long_lived


def feature_count(dim: int, terms: int) -> int:
    """R = C(dim+terms-1, terms-1): all features of degree 0 to terms-1."""
    return math.comb(dim + terms - 1, terms - 1)


def multiset_count(dim: int, degree: int) -> int:
    """C(dim+degree-1, degree): monomials of one degree in `dim` variables; 1 for degree 0."""
    return math.comb(dim + degree - 1, degree) if degree else 1


def unrank(ranks: Tensor, dim: int, degree: int) -> Tensor:
    """Multisets [F, degree] int64, each sorted ascending, of the colexicographic ranks [F] int64, on their device.

    The rank of i1 <= ... <= ip is sum_j C(i_j + j - 1, j); the largest element is found first.
    """
    columns: list[Tensor] = []
    rest = ranks
    for place in range(degree, 0, -1):
        first = torch.tensor([math.comb(i + place - 1, place) for i in range(dim)], dtype=torch.int64, device=ranks.device)
        element = torch.searchsorted(first, rest, right=True) - 1
        columns.append(element)
        rest = rest - first[element]
    return torch.stack(columns[::-1], 1) if columns else ranks.new_empty(ranks.shape[0], 0)


def inverse_multiplicity(indices: Tensor) -> Tensor:
    """1 / prod(multiplicity!) [F] float64 of sorted multisets [F, degree]: times p! it is the multinomial weight."""
    product = torch.ones(indices.shape[0], dtype=torch.float64, device=indices.device)
    run = torch.ones_like(product)
    for left, right in zip(indices.unbind(1)[:-1], indices.unbind(1)[1:], strict=True):
        run = torch.where(left == right, run + 1, torch.ones_like(run))
        product = product * run
    return 1 / product


class TableCache:
    """Index tables by (dim, degree, first, last, device), the least recently used dropped above `limit_nbytes`."""

    def __init__(self, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self.nbytes = 0
        self._tables: OrderedDict[tuple[int, int, int, int, torch.device], tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, dim: int, degree: int, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(multisets [F, degree] int64, 1 / prod(multiplicity!) [F] float64) of the ranks first <= r < last."""
        key = (dim, degree, first, last, device)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        size = (last - first) * (degree + 1) * 8
        kept = size <= self.limit_nbytes // 4
        with long_lived.allocation() if kept else nullcontext():
            indices = unrank(torch.arange(first, last, device=device), dim, degree)
            table = indices, inverse_multiplicity(indices)
        if kept:
            with self._lock:
                if key not in self._tables:
                    self._tables[key] = table
                    self.nbytes += size
                while self.nbytes > self.limit_nbytes:
                    self.nbytes -= self._size(self._tables.popitem(last=False)[1])
        return table

    def clear(self) -> None:
        """Drop every table."""
        with self._lock:
            self._tables.clear()
            self.nbytes = 0

    @staticmethod
    def _size(table: tuple[Tensor, Tensor]) -> int:
        return sum(x.numel() * x.element_size() for x in table)


tables = TableCache(limit_nbytes=16 << 20)
"""Tables of this process. One of more than a quarter of the limit (P >= 5 at large head_dim) is made anew at each use."""


def index_chunks(dim: int, degree: int, chunk: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (indices [F, degree] int64, weights p!/prod(multiplicity!) [F] float64) with F <= chunk, in rank order."""
    count = multiset_count(dim, degree)
    for first in range(0, count, chunk):
        indices, inverse = tables.get(dim, degree, first, min(first + chunk, count), device)
        yield indices, inverse * math.factorial(degree)


def monomials(x: Tensor, indices: Tensor) -> Tensor:
    """x [..., D], indices [F, degree] -> prod_j x[..., indices[:, j]] [..., F]; ones for degree 0.

    Built by degrees: each factor multiplies the monomials of one degree less in place.
    """
    if indices.shape[1] == 0:
        return torch.ones(*x.shape[:-1], indices.shape[0], dtype=x.dtype, device=x.device)
    first, *others = indices.unbind(1)
    out = x.index_select(-1, first)
    for column in others:
        out *= x.index_select(-1, column)
    return out
