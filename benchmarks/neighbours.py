"""Whether it helps near_far to have the neighbours of a query block always exact: `python -m benchmarks.neighbours [--size 128] [--out FILE]`.

q, k, v of the demo's trained model (picture 17, steps 2, 8, 14 and 20 of 24, all layers and heads). Each head is computed by the plain
version with the near blocks of most mass at a density, and with as many where the query block's 4 or 8 neighbours in the picture
are among them and the most massive others fill up. A row has the relative L2 errors against exact attention in float64 over all heads,
the share of exact blocks, and in how many heads the error is lower than without. A number of neighbours that is more than the density
allows is left out. One JSON line per density and number of neighbours is appended to FILE.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.trained import captured
from taylor_patch.backends import tiles
from taylor_patch.backends.near_far import reference
from taylor_patch.backends.near_far.blocks import masses, near_blocks
from taylor_patch.call import TokenGrid

PICTURE, STEPS, AT, TEXT = 17, 24, (2, 8, 14, 20), 16
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3)
FORCED = (0, 4, 8)


def adjacent(grid: TokenGrid, count: int) -> Tensor:
    """[blocks, blocks] bool: the tiles of a picture that share an edge (count 4), an edge or a corner (8), or none (0)."""
    around = tiles.adjacent(grid)
    if count == 8:
        return around
    block = torch.arange(len(around))
    apart = (block[:, None] - block).abs()
    across = -(-grid.w // tiles.tile_shape(grid)[2])
    return around & ((apart == 1) | (apart == across)) & (count > 0)


def with_neighbours(near: Tensor, mass: Tensor, neighbours: Tensor) -> Tensor | None:
    """As many near blocks as in `near` [query blocks, key blocks]: the neighbours, each query block and its best block, then those with most
    mass. None where the former are more already."""
    forced = neighbours | torch.eye(len(near), dtype=torch.bool, device=near.device)
    forced.scatter_(1, mass.argmax(1, keepdim=True), True)
    total = int(near.sum())
    if int(forced.sum()) > total:
        return None
    chosen = mass.masked_fill(forced, torch.inf).flatten().topk(total).indices
    return torch.zeros(near.numel(), dtype=torch.bool, device=near.device).index_fill_(0, chosen, True).view_as(near)


def errors(size: int) -> Iterator[tuple[int, float, int, float, float]]:
    """(number of the head, density, neighbours forced, share of exact blocks, relative L2 error) of all heads."""
    grid = TokenGrid(1, size // 2, size // 2, TEXT)
    calls = captured(PICTURE, size, STEPS, AT)
    heads = [(q[0, h], k[0, h], v[0, h]) for q, k, v in calls for h in range(q.shape[1])]
    for number, (q, k, v) in enumerate(heads):
        scaled = q * q.shape[-1] ** -0.5
        exact = torch.cat([torch.softmax(rows @ k.double().T, -1) @ v.double() for rows in scaled.double().split(2048)])
        head = reference.Head(scaled, k, v, grid)
        mass = masses(head.q_blocks, head.filled, head.blocks)
        for density in DENSITIES:
            routed = near_blocks(mass, density, head.blocks, head.own)
            for count in FORCED:
                near = with_neighbours(routed, mass, adjacent(grid, count).to(routed.device))
                if near is not None:
                    error = float((head.attend(near) - exact).norm() / exact.norm())
                    yield number, density, count, float(near.float().mean()), error


def rows(size: int) -> Iterator[dict[str, Any]]:
    """One for each density and number of neighbours that is possible in every head."""
    found: dict[tuple[float, int], dict[int, tuple[float, float]]] = {}
    for number, density, count, share, error in errors(size):
        found.setdefault((density, count), {})[number] = share, error
    for (density, count), by_head in found.items():
        usual = found[density, 0]
        if len(by_head) < len(usual):
            continue
        x = torch.tensor([error for _, error in by_head.values()], dtype=torch.float64)
        yield {"what": "neighbours", "forced": count, "density": density, "exact_share": round(sum(s for s, _ in by_head.values()) / len(x), 4),
               "rel_l2_median": round(float(x.median()), 6), "rel_l2_mean": round(float(x.mean()), 6),
               "rel_l2_p90": round(float(x.quantile(0.9)), 6), "rel_l2_max": round(float(x.max()), 6), "heads": len(x),
               "heads_lower": sum(error < usual[number][1] for number, (_, error) in by_head.items()),
               "size": size, "steps": STEPS, "tokens": TEXT + size * size // 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--commit", help="recorded where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "neighbours.jsonl")
    arguments = parser.parse_args()
    environment = record.environment(arguments.commit)
    with arguments.out.open("a", encoding="utf-8") as file:
        for row in rows(arguments.size):
            print(json.dumps(row), flush=True)
            file.write(json.dumps({**row, **environment}) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
