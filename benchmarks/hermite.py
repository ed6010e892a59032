"""Hermite against Taylor coefficients on a trained model's q, k, v: `python -m benchmarks.hermite [--size 128] [--write]`.

The demo's model draws a picture with exact attention; at some steps every head's q, k and v are taken and global attention of P
terms with centred keys is compared with the softmax: relative L2 error of a head on sampled rows, float64, so that rounding
plays no part. --write puts the table into docs/accuracy.md between its markers and the rows into benchmarks/results/hermite.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_patch.demo import model as demo_model
from taylor_patch.features import coefficients as series

ROWS = 128
TERMS = (3, 4, 5)
RESULTS = Path("benchmarks/results/hermite.jsonl")
PAGE = Path("docs/accuracy.md")
BEGIN, END = "<!-- benchmarks.hermite begins -->", "<!-- benchmarks.hermite ends -->"


@dataclass(frozen=True)
class Head:
    """One head at one step of a picture: the standard deviation of a row's logits, and the error by (coefficients, P)."""

    picture: int
    step: int
    logit_std: float
    errors: dict[tuple[str, int], float]


def head_errors(q: Tensor, k: Tensor, v: Tensor, picture: int, step: int) -> Head:
    """q, k, v [N, D] of one head -> its errors on evenly spaced rows."""
    q, k, v = q[:: max(1, q.shape[0] // ROWS)].double(), k.double(), v.double()
    x = q @ (k - k.mean(0)).T / math.sqrt(q.shape[1])
    exact = torch.softmax(x, -1) @ v
    variance = x.square().mean(1)
    errors = {}
    for name, coefficients in (("taylor", series.taylor), ("hermite", series.hermite)):
        for terms in TERMS:
            c = coefficients(terms, variance)
            weight = sum((c[:, p, None] * x**p / math.factorial(p) for p in range(1, terms)), c[:, 0, None].expand_as(x))
            out = weight @ v / weight.sum(1, keepdim=True)
            errors[name, terms] = float((out - exact).norm() / exact.norm())
    return Head(picture, step, float(variance.mean().sqrt()), errors)


@torch.no_grad()
def heads_of_a_picture(size: int, steps: int, at: tuple[int, ...], picture: int, device: torch.device) -> list[Head]:
    """Draw a picture with exact attention; every head of every call at the steps `at`."""
    network, texts, vectors = demo_model.load(device)
    found: list[Head] = []
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    for step, (t, t_next) in enumerate(itertools.pairwise(torch.linspace(1, 0, steps + 1).tolist())):
        def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, step: int = step, **_: object) -> Tensor:
            if step in at:
                found.extend(head_errors(q[0, h], k[0, h], v[0, h], picture, step) for h in range(heads))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        sigmas = torch.full((1,), t, device=device)
        x = x + (t_next - t) * network(x, sigmas, texts[picture : picture + 1], vectors[picture : picture + 1], attention,
                                       {"sigmas": sigmas}).float()
    return found


def quantiles(heads: list[Head], key: tuple[str, int]) -> tuple[float, float]:
    """Median and 90th percentile of the errors."""
    values = torch.tensor([head.errors[key] for head in heads], dtype=torch.float64)
    return float(values.quantile(0.5)), float(values.quantile(0.9))


def table(heads: list[Head]) -> str:
    """Markdown: a row for each P, columns for all heads and for those with logit std below 1."""
    diffuse = [head for head in heads if head.logit_std < 1]
    lines = [f"| P | Taylor, {len(heads)} heads | Hermite | Taylor, {len(diffuse)} heads with logit std < 1 | Hermite |"]
    lines.append("|---|---|---|---|---|")
    for terms in TERMS:
        cells = ["{:.4f} / {:.4f}".format(*quantiles(group, (name, terms))) if group else "-"
                 for group in (heads, diffuse) for name in ("taylor", "hermite")]
        lines.append(f"| {terms} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table; with --write also keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--pictures", type=int, nargs="+", default=[17, 18])
    parser.add_argument("--at", type=int, nargs="+", default=[2, 8, 14, 20])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = [head for picture in arguments.pictures
             for head in heads_of_a_picture(arguments.size, arguments.steps, tuple(arguments.at), picture, device)]
    text = table(heads)
    print(text)
    if arguments.write:
        rows = [json.dumps({"size": arguments.size, "picture": head.picture, "step": head.step, "logit_std": round(head.logit_std, 4),
                            **{f"{name}_{terms}": float(f"{error:.4g}") for (name, terms), error in head.errors.items()}}) for head in heads]
        RESULTS.write_text("\n".join(rows) + "\n", encoding="utf-8")
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
