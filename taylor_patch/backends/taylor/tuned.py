"""Tile sizes of the Taylor kernels by GPU architecture, as measured with benchmarks/taylor_tiles.py; nothing is tuned in a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """rows: queries (evaluate) or keys (accumulate) a step; warps and software-pipeline stages of a program.

    blocks: blocks of 64 features that a program of accumulate holds, and that evaluate takes a step in degree 3; 1 or 2, and from
    degree 4 on always 1.
    """

    rows: int
    warps: int
    stages: int
    blocks: int = 2


Table = dict[tuple[int, int], dict[int, Tile]]
"""Architecture -> padded value width -> tile, for 16-bit types."""

EVALUATE: Table = {(9, 0): {32: Tile(128, 4, 3), 64: Tile(128, 4, 3), 128: Tile(64, 4, 3), 256: Tile(64, 8, 2)}}
ACCUMULATE: Table = {(9, 0): {32: Tile(64, 4, 3, 1), 64: Tile(64, 4, 3), 128: Tile(64, 4, 3, 1), 256: Tile(32, 8, 2)}}

DEFAULT = Tile(64, 4, 2)
"""Where nothing was measured."""
WIDE = Tile(32, 8, 1)
"""Values of more than 128 columns where nothing was measured."""
FLOAT32 = {"evaluate": Tile(64, 8, 1), "accumulate": Tile(32, 8, 1, blocks=1)}
"""Float32 features: three tensor-core products in place of one, so registers are short. 64 queries are what Hopper's products need."""


def choose(kernel: str, arch: tuple[int, int], degree: int, value_width: int, item_nbytes: int, rows: int) -> Tile:
    """The tile of "evaluate" or "accumulate" for an architecture and a padded value width. degree: of the features, 0 where one tile
    serves all degrees. rows: block_size of the options, 0 for ours."""
    if item_nbytes == 4:
        tile = FLOAT32[kernel]
    else:
        table = EVALUATE if kernel == "evaluate" else ACCUMULATE
        tile = table.get(arch, {}).get(max(value_width, 32), WIDE if value_width > 128 else DEFAULT)
    return Tile(rows or tile.rows, tile.warps if rows == 0 or rows >= 16 * tile.warps else 4, tile.stages, tile.blocks if degree <= 3 else 1)
