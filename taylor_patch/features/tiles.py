"""Features of one degree as tiles for tensor cores.

A block is 64 features: a lead monomial of degree p - 2 times the outer product of two tiles of 8 coordinates, (a, b) with
a <= b. Leads are all multisets of coordinates below 8 (a + 1). Inside a tile nothing is sorted, so some monomials appear
more than once; the weight of a block makes the sum over all blocks exactly (q.k)^p / p!:

    1 / (prod(multiplicity of lead!) (m + 1))            a < b,  m = elements of the lead in tile a
    1 / (prod(multiplicity of lead!) (m + 1) (m + 2))    a = b

(of the ordered p-tuples, those with m + 1 or m + 2 elements in one tile are met once for each that may stand last there).
Padded against exact features at 128 coordinates: 8,704 for 8,256 in degree 2 (tiles of 16: 9,216) and 417,792 for 357,760
in degree 3 (tiles of 16: 491,520).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from taylor_patch import long_lived
from taylor_patch.features.symmetric import multiset_count

TILE = 8
BLOCK = TILE * TILE
"""Features of a block."""


@dataclass(frozen=True)
class TileLayout:
    """Blocks of degree >= 2 over `dim` coordinates, pair by pair, and lead by lead inside a pair."""

    dim: int
    degree: int

    @property
    def tiles(self) -> int:
        """Tiles of 8 coordinates; the last may hold fewer."""
        return -(-self.dim // TILE)

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(a, b), a-major: pairs of the same a have the same leads and lie together."""
        return tuple((a, b) for a in range(self.tiles) for b in range(a, self.tiles))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First block of each pair, then the number of all blocks."""
        total, found = 0, [0]
        for a, _ in self.pairs:
            total += multiset_count(TILE * (a + 1), self.degree - 2)
            found.append(total)
        return tuple(found)

    @property
    def blocks(self) -> int:
        return self.offsets[-1]

    def pair_of(self, block: int) -> int:
        """Number of the pair that a block belongs to."""
        return bisect.bisect_right(self.offsets, block) - 1

    def lead_range(self, first: int, last: int) -> tuple[int, int]:
        """The leads that the blocks first <= i < last use, as a range of ranks that holds them all."""
        low, high = self.pair_of(first), self.pair_of(last - 1)
        if low == high:
            return first - self.offsets[low], last - self.offsets[low]
        return 0, max(self.offsets[i + 1] - self.offsets[i] for i in range(low, high + 1))


@lru_cache(maxsize=64)
def layout(dim: int, degree: int) -> TileLayout:
    """The layout of (dim, degree), with its tables kept."""
    return TileLayout(dim, degree)


@lru_cache(maxsize=64)
def pair_table(dim: int, degree: int, device: torch.device) -> Tensor:
    """[pairs, 3] int32 on `device`: a, b and the first block of each pair. Raises OverflowError from 2^31 blocks on."""
    shape = layout(dim, degree)
    if shape.blocks >= 2**31:
        raise OverflowError(f"degree {degree} over {dim} coordinates has {shape.blocks} blocks of features")
    rows = [(a, b, start) for (a, b), start in zip(shape.pairs, shape.offsets, strict=False)]
    with long_lived.allocation():
        return torch.tensor(rows, dtype=torch.int32, device=device)
