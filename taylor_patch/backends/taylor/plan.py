"""What a global Taylor call does on the GPU, from shapes alone: feature chunks, heads at once, splits, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from taylor_patch.features.tiles import BLOCK, layout

Z_COLUMNS = 16
PROGRAMS_WANTED = 264
"""Fewer programs than this (two for each of 132 multiprocessors) are split over the sequence."""
KEYS_A_SPLIT = 1024


@dataclass(frozen=True)
class Chunk:
    """Blocks first <= i < last of one degree that are accumulated and evaluated together. Degree 0: P <= 2, no blocks."""

    degree: int
    first: int
    last: int

    @property
    def blocks(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Plan:
    """Sizes of one call. A state is the sums of one (batch entry, key head, sub-head block)."""

    batch: int
    heads: int
    heads_kv: int
    n_queries: int
    n_keys: int
    dim: int  # of a sub-head block
    sub_head_blocks: int
    terms: int
    hermite: bool
    feature_chunk: int  # features; 0: a whole degree
    value_chunk: int  # columns; 0: all
    store_nbytes: int  # bytes of an element of S
    workspace_limit: int  # bytes

    @cached_property
    def states(self) -> int:
        return self.batch * self.heads_kv * self.sub_head_blocks

    @cached_property
    def group(self) -> int:
        """Query heads that share a state."""
        return self.heads // self.heads_kv

    @cached_property
    def value_columns(self) -> tuple[tuple[int, int], ...]:
        """Ranges of value columns that are worked on one after the other."""
        step = self.value_chunk or self.dim
        return tuple((first, min(first + step, self.dim)) for first in range(0, self.dim, step))

    @cached_property
    def width(self) -> int:
        """Value columns at once."""
        return min(self.value_chunk or self.dim, self.dim)

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """Feature chunks by rising degree; degrees 0 and 1 go with the last chunk of degree 2."""
        found = []
        for degree in range(2, self.terms):
            blocks = layout(self.dim, degree).blocks
            # Leads of degree 3 are worked on in pairs, and their denominators lie in groups of 8.
            step = max(8, self.feature_chunk // (8 * BLOCK) * 8) if self.feature_chunk else blocks
            found += [Chunk(degree, first, min(first + step, blocks)) for first in range(0, blocks, step)]
        return tuple(found) or (Chunk(0, 0, 0),)

    def splits(self, programs: int) -> int:
        """Shares of the keys that are summed apart, then added in order."""
        if programs >= PROGRAMS_WANTED:
            return 1
        return max(1, min(-(-PROGRAMS_WANTED // programs), self.n_keys // KEYS_A_SPLIT))

    def moment_splits(self, states: int) -> int:
        """Shares of the keys in the sums of degrees 0 and 1, whose programs are small: twice as many are wanted."""
        return self.splits(states * -(-self.dim // 128))

    def state_nbytes(self, chunk: Chunk, states: int) -> int:
        """S and Z of a chunk, and with several splits their float32 parts and total. In degree 3 Z is float32 and apart."""
        rows, columns, apart = states * chunk.blocks * BLOCK, -(-self.width // 16) * 16, chunk.degree == 3
        row = columns if apart else columns + Z_COLUMNS
        splits = self.splits(states * -(-chunk.blocks // 2)) if chunk.blocks else 1
        parts = splits + 1 if splits > 1 else 0
        return rows * (row * (self.store_nbytes + 4 * parts) + (4 * (parts or 1) if apart else 0))

    def group_nbytes(self, states: int) -> int:
        """Bytes while `states` states are worked on."""
        moments = 4 * states * (self.dim + 1) * (self.width + 1)
        partial = len(self.chunks) > 1
        sums = 4 * states * self.group * self.n_queries * (self.width + 1 + self.hermite) if partial else 0
        during_moments = moments * (self.moment_splits(states) + 1)
        return max(during_moments, moments + sums + max(self.state_nbytes(chunk, states) for chunk in self.chunks))

    @cached_property
    def states_at_once(self) -> int:
        """The most states whose workspace stays within the limit; 1 at least."""
        low, high = 1, self.states
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.group_nbytes(middle) <= self.workspace_limit else (low, middle - 1)
        return low

    def nbytes(self, has_factors: bool, has_weight: bool) -> int:
        """Bytes beside inputs and output: a group of states, the factors of rows, the weights of keys."""
        factors = 4 * self.batch * (self.heads * self.n_queries + self.heads_kv * self.n_keys) if has_factors else 0
        return self.group_nbytes(self.states_at_once) + factors + (4 * self.batch * self.n_keys if has_weight else 0)


def item_nbytes(dtype: torch.dtype) -> int:
    """Bytes of an element."""
    return torch.empty((), dtype=dtype).element_size()


def compute_dtype(dtype: torch.dtype, force_fp32: bool) -> torch.dtype:
    """The dtype of features and of the products with them."""
    return torch.float32 if force_fp32 else dtype


@lru_cache(maxsize=256)
def make_plan(q_shape: torch.Size, k_shape: torch.Size, dtype: torch.dtype, terms: int, hermite: bool, sub_head_blocks: int,
              feature_chunk: int, value_chunk: int, s_store_bf16: bool, force_fp32: bool, workspace_limit: int) -> Plan:
    """The plan of a call; q_shape [B, H, N_q, D], k_shape [B, H_kv, N_kv, D]."""
    store = torch.bfloat16 if s_store_bf16 else compute_dtype(dtype, force_fp32)
    return Plan(q_shape[0], q_shape[1], k_shape[1], q_shape[2], k_shape[2], q_shape[3] // sub_head_blocks, sub_head_blocks, terms,
                hermite and terms > 2, feature_chunk, value_chunk, item_nbytes(store), workspace_limit)
