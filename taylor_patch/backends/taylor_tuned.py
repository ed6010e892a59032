"""Tile sizes of the Taylor kernels by GPU architecture, as measured with benchmarks/taylor.py; nothing is tuned in a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """rows: queries (evaluate) or keys (accumulate) a step; warps and software-pipeline stages of a program."""

    rows: int
    warps: int
    stages: int


Table = dict[tuple[int, int], dict[int, Tile]]
"""Architecture -> padded value width -> tile, for 16-bit types."""

EVALUATE: Table = {(9, 0): {32: Tile(128, 4, 3), 64: Tile(128, 4, 3), 128: Tile(64, 4, 3), 256: Tile(64, 8, 2)}}
ACCUMULATE: Table = {(9, 0): {32: Tile(64, 4, 3), 64: Tile(64, 4, 3), 128: Tile(32, 4, 3), 256: Tile(32, 8, 2)}}
ACCUMULATE_LEADS: Table = {(9, 0): {32: Tile(64, 4, 3), 64: Tile(64, 4, 3)}}

DEFAULT = Tile(64, 4, 2)
"""Where nothing was measured."""
WIDE = Tile(32, 8, 1)
"""Float32 features, and values of more than 128 columns where nothing was measured."""


def choose(table: Table, arch: tuple[int, int], value_width: int, item_nbytes: int, rows: int) -> Tile:
    """The tile for an architecture and a padded value width. rows: block_size of the options, 0 for the table's."""
    fallback = WIDE if value_width > 128 else DEFAULT
    tile = WIDE if item_nbytes == 4 else table.get(arch, {}).get(max(value_width, 32), fallback)
    return Tile(rows, tile.warps if rows >= 16 * tile.warps else 4, tile.stages) if rows else tile
