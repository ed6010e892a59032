"""What the second-order term of the far field's value is worth, on trained attention: `python -m benchmarks.second_order`.

To second order in q the value of a far block is v_b + C_w' q + 1/2 E[(v - v_b) (q.(k - k_b))^2]. The term is not to be centred: v - v_b
has mean zero in every block, so a constant taken from the square changes nothing. Pooled over blocks and restricted to the leading
directions U of S_w it is 1/2 (U'q)' T (U'q), T [D] symmetric matrices. Plain PyTorch, all layers and heads of the demo's model
(picture 17), rows of every STRIDE-th query block against exact attention in the same precision.

fixed: relative L2 error over heads at a density, with the factors at 1 or fitted by the probe's 64 rows. aimed: what the probe settles
on for a target, and the error it gives. Factor of the term: "one"; "linear", that of the linear term; "free", fitted as a third.
directions: "S_w", its eigenvectors; "near_far", those that near_far finds; "qS_w", those that matter most for the queries; rank 0 is
without the term, "all" without U.
One JSON line per measurement is appended to FILE.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.trained import captured
from taylor_patch.backends.near_far import aim
from taylor_patch.backends.near_far.blocks import masses, near_blocks, tail_logits
from taylor_patch.backends.near_far.reference import Head
from taylor_patch.backends.tiles import BLOCK
from taylor_patch.call import TokenGrid

PICTURE = 17
DENSITIES = (0.05, 0.1, 0.2)
TARGETS = (0.02, 0.03, 0.05)
VARIANTS = ((0, "S_w", "one"), *((8, "S_w", how) for how in ("one", "linear", "free")), (8, "near_far", "linear"), (8, "qS_w", "linear"),
            (16, "S_w", "linear"), ("all", "", "linear"))
QUADRATIC = (0.5, 1.5)
"""Bounds of the factor of the term where it is free."""
Variant = tuple[int | str, str, str]


@dataclass(frozen=True)
class Rows:
    """Some query rows of one head, exactly, and what their far field is made of; the second-order value term is without the tail's mass."""

    q: Tensor  # [R, D] times scale
    block: Tensor  # [R]
    logits: Tensor  # [R, keys]
    values: Tensor  # [keys, D]
    exact: Tensor  # [R, D]
    second: dict[tuple[int | str, str], Tensor]  # rank and directions -> [R, D]


def directions(head: Head, rank: int, kind: str) -> tuple[Tensor, Tensor]:
    """(A, B) [D, rank]: q.d is about (A'q).(B'd)."""
    if kind == "near_far":
        return head.blocks.directions, head.blocks.directions
    spread, vectors = torch.linalg.eigh(head.blocks.cov_kk.double())
    if kind == "S_w":
        top = vectors[:, -rank:].to(head.q.dtype)
        return top, top
    root = spread.clamp_min(spread[-1] * 1e-6).sqrt()
    half, inverse = vectors * root @ vectors.T, vectors / root @ vectors.T
    q = head.q_blocks[head.filled].double()
    leading = torch.linalg.eigh(half @ (q.T @ q) @ half)[1][:, -rank:]
    return (half @ leading).to(head.q.dtype), (inverse @ leading).to(head.q.dtype)


def second_order(head: Head, q: Tensor, rank: int | str, kind: str) -> Tensor:
    """1/2 E[(v - v_b) (q.(k - k_b))^2], pooled over blocks; [R, D] for q [R, D]."""
    blocks = head.blocks
    dk, dv = ((x - mean[:, None]).flatten(0, 1) for x, mean in ((blocks.k, blocks.mean_k), (blocks.v, blocks.mean_v)))
    weight = blocks.log_weight.exp().flatten()
    dv = dv * (weight / weight.sum())[:, None]
    if isinstance(rank, str):
        return 0.5 * (q @ dk.T).square() @ dv
    a, b = directions(head, rank, kind)
    key, query = dk @ b, q @ a
    third = (key[:, :, None] * key[:, None]).flatten(1).T @ dv
    return 0.5 * (query[:, :, None] * query[:, None]).flatten(1) @ third


def rows_of(head: Head, block: Tensor, place: Tensor) -> Rows:
    """Rows `place` of blocks `block`."""
    q, blocks = head.q_blocks[block, place], head.blocks
    logits = torch.cat([q @ blocks.k.flatten(0, 1).T + blocks.log_weight.flatten(), q @ head.text[0].T + head.text[2]], 1)
    values = torch.cat([blocks.v.flatten(0, 1), head.text[1]])
    second = {(rank, kind): second_order(head, q, rank, kind) for rank, kind, _ in VARIANTS if rank}
    return Rows(q, block, logits, values, torch.softmax(logits, 1) @ values, second)


def parts(head: Head, rows: Rows, near: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """(what is missing without value terms [R, D], mass of the tail [R, 1], linear term [R, D])."""
    near = near[rows.block]
    far = tail_logits(rows.q, head.blocks, factor).masked_fill(near, -torch.inf)
    logits = rows.logits.clone()
    logits[:, : near.shape[1] * BLOCK].masked_fill_(~near.repeat_interleave(BLOCK, 1), -torch.inf)
    near_share, far_share = torch.softmax(torch.cat([logits, far], 1), 1).split([logits.shape[1], far.shape[1]], 1)
    tail = far_share.sum(1, keepdim=True)
    return rows.exact - near_share @ rows.values - far_share @ head.blocks.mean_v, tail, tail * (rows.q @ head.blocks.cov_kv)


def products(missing: Tensor, linear: Tensor, second: Tensor, exact: Tensor) -> list[float]:
    """m.m, m.l, m.s, l.l, l.s, s.s, exact.exact: all that factors and errors depend on."""
    pairs = ((missing, missing), (missing, linear), (missing, second), (linear, linear), (linear, second), (second, second), (exact, exact))
    return torch.stack([(x * y).sum() for x, y in pairs]).double().tolist()


def fit(sums: list[float], how: str) -> tuple[float, float]:
    """Factors of the linear term and of the second-order one for the least error."""
    _, ml, ms, ll, ls, ss, _ = sums
    low, high = aim.LINEAR
    if how == "linear":
        a = min(max((ml + ms) / (ll + 2 * ls + ss), low), high)
        return a, a
    b = 1.0
    a = min(max((ml - b * ls) / ll, low), high)
    if how == "free":
        for _ in range(50):  # one after the other, so that bounds hold
            b = min(max((ms - a * ls) / max(ss, 1e-30), QUADRATIC[0]), QUADRATIC[1])
            a = min(max((ml - b * ls) / ll, low), high)
    return a, b


def error(sums: list[float], a: float, b: float) -> float:
    """Relative L2."""
    mm, ml, ms, ll, ls, ss, xx = sums
    return (max(mm + a * a * ll + b * b * ss - 2 * a * ml - 2 * b * ms + 2 * a * b * ls, 0.0) / xx) ** 0.5


def best(head: Head, probe: Rows, near: Tensor, variants: tuple[Variant, ...]) -> dict[Variant, tuple[float, float, float, float]]:
    """Variant -> (error, factor of the second-order weight, of the linear term, of the second-order value) of the probe."""
    found = {variant: (float("inf"), 1.0, 1.0, 1.0) for variant in variants}
    for factor in aim.FACTORS:
        missing, tail, linear = parts(head, probe, near, factor)
        for variant in variants:
            second = tail * probe.second.get(variant[:2], torch.zeros_like(probe.q))
            sums = products(missing, linear, second, probe.exact)
            a, b = fit(sums, variant[2])
            found[variant] = min(found[variant], (error(sums, a, b), factor, a, b))
    return found


def settled(head: Head, probe: Rows, near: list[Tensor], target: float) -> dict[Variant, tuple[float, float, float, float]]:
    """Variant -> (density, and the three factors) as aim.choose takes them."""
    goal, found = aim.MARGIN * target, {}
    tried = [best(head, probe, x, VARIANTS) for x in near]
    for variant in VARIANTS:
        errors = [row[variant][0] for row in tried]
        first = next((i for i, e in enumerate(errors) if e <= goal), None)
        if first is None:
            found[variant] = (1.0, 1.0, 1.0, 1.0)
            continue
        density = aim.DENSITIES[first]
        if first:
            part = torch.tensor(errors[first - 1] / goal).log() / torch.tensor(errors[first - 1] / max(errors[first], 1e-3 * goal)).log()
            density = aim.DENSITIES[first - 1] * (density / aim.DENSITIES[first - 1]) ** float(part)
        found[variant] = (density, *tried[first][variant][1:])
    return found


def measure(size: int, stride: int, steps: int) -> Iterator[dict[str, Any]]:
    """Everything, for pictures of `size` pixels."""
    grid = TokenGrid(1, size // 2, size // 2, 16)
    errors: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    densities: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for q, k, v in captured(PICTURE, size, steps, tuple(steps * twelfth // 12 for twelfth in (1, 4, 7, 10))):
        for h in range(q.shape[1]):
            head = Head(q[0, h] * q.shape[-1] ** -0.5, k[0, h], v[0, h], grid)
            count = head.q_blocks.shape[0]
            mass = masses(head.q_blocks, head.filled, head.blocks)
            probe = rows_of(head, *aim.probe_rows(count, q.device))
            some = torch.arange(0, count, stride, device=q.device).repeat_interleave(BLOCK)
            rows = rows_of(head, some, torch.arange(BLOCK, device=q.device).repeat(len(some) // BLOCK))
            share = torch.softmax(probe.logits, 1)[:, : count * BLOCK].view(aim.ROWS, count, BLOCK).sum(2)
            always = (share > aim.sink_share(count)).sum(0) > aim.SINK_ROWS * aim.ROWS

            def add(key: tuple[Any, ...], variant: Variant, made: tuple[Tensor, Tensor, Tensor], a: float, b: float, rows: Rows = rows) -> None:
                missing, tail, linear = made
                second = tail * rows.second.get(variant[:2], torch.zeros_like(rows.q))
                errors[(*key, variant)].append(error(products(missing, linear, second, rows.exact), a, b))

            for density in DENSITIES:
                near = near_blocks(mass, density, head.blocks, True)
                made = {1.0: parts(head, rows, near, 1.0)}
                for variant in VARIANTS:
                    if variant[2] != "free" and variant != (8, "S_w", "one"):  # with factors at 1, "one" and "linear" are the same
                        add(("fixed", density, False), variant, made[1.0], 1.0, 1.0)
                for variant, (_, factor, a, b) in best(head, probe, near, VARIANTS).items():
                    made.setdefault(factor, parts(head, rows, near, factor))
                    add(("fixed", density, True), variant, made[factor], a, b)
            near = [near_blocks(mass, density, head.blocks, True) | always for density in aim.DENSITIES]
            for target in TARGETS:
                for variant, (density, factor, a, b) in settled(head, probe, near, target).items():
                    densities[target, variant].append(density)
                    if density == 1:
                        errors["aimed", target, True, variant].append(0.0)
                    else:
                        seen = near_blocks(mass, density, head.blocks, True) | always
                        add(("aimed", target, True), variant, parts(head, rows, seen, factor), a, b)
    for (what, value, fitted, variant), found in sorted(errors.items(), key=str):
        rank, kind, how = variant
        x = torch.tensor(found, dtype=torch.float64)
        row = {"what": what, "density" if what == "fixed" else "target": value, "fitted": fitted, "rank": rank, "directions": kind,
               "factor": how, "size": size, "steps": steps, "stride": stride, "tokens": grid.tokens + 16,
               "rel_l2_median": round(float(x.median()), 6),
               "rel_l2_mean": round(float(x.mean()), 6), "rel_l2_p90": round(float(x.quantile(0.9)), 6),
               "rel_l2_max": round(float(x.max()), 6), "heads": len(found)}
        if what == "aimed":
            d = torch.tensor(densities[value, variant], dtype=torch.float64)
            row |= {"density_mean": round(float(d.mean()), 5), "density_median": round(float(d.median()), 5)}
        yield row


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--stride", type=int, default=8, help="one query block in so many is compared")
    parser.add_argument("--steps", type=int, default=24, help="of the picture; four of them are measured")
    parser.add_argument("--commit", help="recorded where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "second_order.jsonl")
    arguments = parser.parse_args()
    environment = record.environment(arguments.commit)
    with arguments.out.open("a", encoding="utf-8") as file:
        for row in measure(arguments.size, arguments.stride, arguments.steps):
            file.write(json.dumps({**row, **environment}) + "\n")
            file.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
