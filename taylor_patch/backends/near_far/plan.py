"""Sizes of a near_far call on the GPU: blocks, tuned tiles and temporary memory, from shapes only."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from taylor_patch.backends.near_far import aim
from taylor_patch.backends.near_far.blocks import ROUTING_SAMPLES, sees_neighbours
from taylor_patch.backends.tiles import BLOCK, grids, is_line, tile_shape
from taylor_patch.call import AttentionCall, TokenGrid

WORKSPACE_LIMIT = 960 * 2**20
"""Bytes of temporary memory that a call aims to stay below; heads go in as many rounds as that takes, at least one head each."""
COVARIANCE_PROGRAMS = 528
"""Programs of the covariance kernel that are aimed at: a few for each of the 132 multiprocessors of a large GPU."""
COLUMN_TILE = 128
"""Most columns of a covariance that one program of the preparation makes."""
BINS = 1024
"""Bins of the histogram of predicted masses."""
PROBE_PROGRAMS = 528
"""Programs of the probe that are aimed at."""

LARGEST_DENSITY = 0.55
"""Mean share of exact blocks above which exact attention serves as well: 0.56 at 16,896 tokens and more beyond, extrapolated
(docs/performance.md)."""

CROSSOVER_TOKENS: dict[tuple[int, int], int] = {(9, 0): 8192}
"""Compute capability -> least tokens at which near_far was measured to be faster than exact attention (docs/performance.md)."""


@dataclass(frozen=True)
class Tiles:
    """Launch parameters of the attention kernel.

    far: block means of one step of the far field. stages, far_stages: tiles of the near and of the far field that are in shared memory
    at a time. tma: tiles of k and v come through the tensor memory accelerator, where Triton has descriptors.
    """

    far: int = 64
    warps: int = 4
    stages: int = 2
    far_stages: int = 2
    tma: bool = False


TUNED: dict[tuple[int, int, int], Tiles] = {
    (9, 2, 64): Tiles(stages=3, tma=True),
    # 114 KB, so that two programs fit on a multiprocessor; with three stages of the far field one does.
    (9, 2, 128): Tiles(stages=3, tma=True),
}
"""(major compute capability, bytes of an element, padded head_dim) -> tiles that were fastest."""


@dataclass(frozen=True)
class Side:
    """The queries or the keys of a call in blocks of 64: image tiles in the order of tiles.tile_index, then tokens outside the image."""

    tokens: int
    grid: TokenGrid

    @cached_property
    def tile(self) -> tuple[int, int, int]:
        return tile_shape(self.grid)

    @cached_property
    def image_blocks(self) -> int:
        return math.prod(-(-size // part) for size, part in zip((self.grid.t, self.grid.h, self.grid.w), self.tile, strict=True))

    @cached_property
    def outside(self) -> int:
        """Tokens outside the image."""
        return self.tokens - self.grid.tokens

    @cached_property
    def blocks(self) -> int:
        return self.image_blocks + -(-self.outside // BLOCK)

    @cached_property
    def geometry(self) -> tuple[int, ...]:
        """What layout.block_tokens takes: grid, start, tokens outside, tile."""
        return (self.grid.t, self.grid.h, self.grid.w, self.grid.start, self.outside, *self.tile)


@dataclass(frozen=True)
class Plan:
    """What is derived from the shapes of a call.

    A lane is one key head of one batch element; `group` query heads share it. In self-attention queries and keys are the same side.
    """

    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    dtype: torch.dtype
    masked: bool
    queries: Side
    keys: Side
    tiles: Tiles
    aimed: bool = False
    """Whether the density is found by a probe (aim.py)."""

    @cached_property
    def own(self) -> bool:
        """Whether queries and keys lie in the same blocks, so that each block of queries has one of its own among the keys."""
        return self.queries == self.keys

    @cached_property
    def neighbours(self) -> bool:
        """Whether the blocks around a query block are near whatever their mass."""
        return sees_neighbours(self.own, self.queries.grid, self.queries.image_blocks)

    @cached_property
    def across(self) -> int:
        """Image blocks of the queries side by side."""
        return -(-self.queries.grid.w // self.queries.tile[2])

    @cached_property
    def between(self) -> int:
        """How a density between two of those that were tried is found."""
        return aim.how_between(is_line(self.keys.grid), self.keys.image_blocks)

    @cached_property
    def group(self) -> int:
        return self.heads // self.heads_kv

    @cached_property
    def lanes(self) -> int:
        return self.batch * self.heads_kv

    @cached_property
    def dim(self) -> int:
        """head_dim padded to a power of two, float32 to 32 at least.

        Triton 3.6 reads past its shared memory in float32 products over 16 columns (found with compute-sanitizer in tail_kernel, H200).
        """
        return max(16 if self.dtype.itemsize == 2 else 32, 1 << (self.head_dim - 1).bit_length())

    @cached_property
    def column_tile(self) -> int:
        """Columns of a covariance that one program of the preparation makes."""
        return min(self.dim, COLUMN_TILE)

    @cached_property
    def far_stride(self) -> int:
        """Image blocks of the keys, rounded up: length of the rows that the far field reads without masks."""
        return -(-self.keys.image_blocks // 128) * 128

    @cached_property
    def score_steps(self) -> int:
        """Tiles of 64 key blocks that one program of the scoring kernel goes through; one of them is counted in the histogram."""
        return 1 << min(3, max(0, ((self.keys.image_blocks - 1) // 128).bit_length() - 1))

    @cached_property
    def biased(self) -> bool:
        """True where keys have a bias: a key mask, or blocks of fewer than 64 tokens."""
        return self.masked or self.keys.tokens != self.keys.blocks * BLOCK

    @cached_property
    def kernels(self) -> tuple[Hashable, ...]:
        """What of a plan makes Triton compile kernels anew. The strides of q, k and v do so too, where one becomes a multiple of 16."""
        return (self.dtype, self.head_dim, self.masked, self.biased, self.aimed, self.own, self.neighbours, self.between,
                self.queries.tile, self.keys.tile, self.tiles, self.score_steps, self.group == 1, self.group % 16 == 0,
                self.keys.blocks < 2**15)

    @cached_property
    def splits(self) -> int:
        """Programs of the preparation kernel per lane and part."""
        return max(1, min(self.keys.image_blocks, COVARIANCE_PROGRAMS // (2 * self.dim // self.column_tile * self.round_lanes)))

    @cached_property
    def probe_splits(self) -> int:
        """Shares of the key blocks that programs of the probe take."""
        programs = self.lanes * self.group * len(aim.DENSITIES)
        return max(1, min(self.keys.blocks // 4, -(-PROBE_PROGRAMS // programs)))

    @cached_property
    def round_lanes(self) -> int:
        """Lanes of one round, so that the workspace stays below its limit."""
        most = max(1, WORKSPACE_LIMIT // self._lane_nbytes)
        return -(-self.lanes // -(-self.lanes // most))

    @cached_property
    def _lane_nbytes(self) -> int:
        """Bytes of a lane but for the preparation's partial sums, which are small."""
        return sum(math.prod(shape) * dtype.itemsize for name, shape, dtype in self._lane_buffers(1) if not name.startswith("partial"))

    @cached_property
    def buffers(self) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
        """(name, shape, dtype) of every temporary array of a round; the leading dimension is the lane."""
        return tuple((name, (self.round_lanes, *shape), dtype) for name, shape, dtype in self._lane_buffers(self.splits))

    def _lane_buffers(self, splits: int) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """(name, shape of one lane, dtype) of every temporary array."""
        dim, half, full = self.dim, self.dtype, torch.float32
        queries, keys = self.queries, self.keys
        yield "k", (keys.blocks * BLOCK, dim), half
        yield "v", (keys.blocks * BLOCK, dim), half
        yield "bias", (keys.blocks * BLOCK if self.biased else 0,), full
        yield "mean_k", (keys.image_blocks, dim), half
        yield "mean_v", (keys.image_blocks, dim), half
        yield "precise_k", (keys.image_blocks, dim), full
        yield "precise_v", (keys.image_blocks, dim), full
        yield "log_mass", (self.far_stride,), full
        yield "trace", (self.far_stride,), full
        yield "mean_trace", (1,), full
        yield "centre", (dim,), full
        yield "covariance", (2 * dim, dim), half
        yield "column_scale", (2 * dim,), full
        yield "partial_covariance", (splits, 2 * dim, dim), full
        yield "partial_mass", (splits, 2), full
        yield "sample", (self.group, ROUTING_SAMPLES, queries.image_blocks, dim), half
        yield "sample_share", (ROUTING_SAMPLES, queries.image_blocks), full
        yield "log_total", (self.group, ROUTING_SAMPLES, queries.image_blocks), full
        yield "far", (self.group, queries.image_blocks, self.far_stride), full
        yield "histogram", (self.group, 2 * BINS), torch.int32
        yield "list", (self.group, queries.blocks, keys.blocks), torch.int16 if keys.blocks < 2**15 else torch.int32
        yield "count", (self.group, queries.blocks), torch.int32
        yield "order", (self.group, queries.image_blocks), torch.int32
        if self.aimed:
            yield "block_mass", (self.group, aim.ROWS, keys.image_blocks), full
            for name, densities in (("exact", 1), ("near", len(aim.DENSITIES))):
                yield f"{name}_numerator", (self.group, densities, self.probe_splits, aim.ROWS, dim), full
                yield f"{name}_top", (self.group, densities, self.probe_splits, aim.ROWS), full
                yield f"{name}_mass", (self.group, densities, self.probe_splits, aim.ROWS), full
            yield "sums", (self.group, len(aim.DENSITIES), len(aim.FACTORS), 4), full

    @cached_property
    def workspace_nbytes(self) -> int:
        """Bytes of all temporary arrays of a round; the allocator hands out multiples of 512."""
        return sum(-(-math.prod(shape) * dtype.itemsize // 512) * 512 for _, shape, dtype in self.buffers)

    def allocate(self, device: torch.device) -> dict[str, Tensor]:
        """The temporary arrays of a round, uninitialised."""
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape, dtype in self.buffers}


def tiles_for(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> Tiles:
    """Tuned tiles where somebody measured, else ones that fit in shared memory nearly everywhere."""
    dim = max(16, 1 << (head_dim - 1).bit_length())
    fallback = Tiles(far=32, stages=1, far_stages=1) if dim * dtype.itemsize > 256 else Tiles()
    return TUNED.get((capability[0], dtype.itemsize, dim), fallback)


@lru_cache(maxsize=256)
def make(batch: int, heads: int, heads_kv: int, head_dim: int, dtype: torch.dtype, masked: bool, n_q: int, grid: TokenGrid, n_kv: int,
         key_grid: TokenGrid, capability: tuple[int, int], aimed: bool) -> Plan:
    """The plan of a call of these shapes."""
    return Plan(batch, heads, heads_kv, head_dim, dtype, masked, Side(n_q, grid), Side(n_kv, key_grid), tiles_for(capability, dtype, head_dim),
                aimed)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU, (0, 0) for anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else (0, 0)


def of_call(call: AttentionCall, aimed: bool = False) -> Plan:
    """The plan of a call. aimed: its density is found by a probe."""
    batch, heads, n_q, head_dim = call.q.shape
    grid, key_grid = grids(call)
    return make(batch, heads, call.k.shape[1], head_dim, call.q.dtype, call.key_mask is not None, n_q, grid, call.k.shape[2], key_grid,
                capability_of(call.q.device), aimed)
